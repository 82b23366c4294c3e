"""Attention kernels on a GPU: ours beside every peer that is installed, on the grids of real models.

    python eval/bench_attention.py --list                         the sets of calls, without running any
    python eval/bench_attention.py                                all of them, about half an hour of one H200
    python eval/bench_attention.py --only 30720 --output some.csv the sets whose name matches; --seconds limits the time
    python eval/bench_attention.py --only backward --append       these sets again, beside the other rows
    python eval/bench_attention.py --only integers --output x.csv integer attention alone, under a minute
    python eval/bench_attention.py --only integers --clocks 3 --output x.csv   clock, power and energy of a call, too
    python eval/check_goals.py                                    what the rows say about the goals
    python eval/plot_attention.py                                 figures from the rows

Everything in one set is timed in turn, in another order every round, with an 8192^3 bf16 matrix product among it:
cards slow down as they warm up, so only figures of one set compare. Ahead of each call the card works on such products
for some 15 ms, as a model's linear layers do between two calls: a card that has a limit of power takes a call that
follows a hot one several percent longer, and no kernel shall gain from its neighbour. Maps and lists are timed from an
idle card on instead, so that what the CPU does for them counts.

Inputs are random and new in every run. A call is timed after its own output passed the error check (at most twice the
error of plain torch in the same precision against fp64, on some rows of two heads); a peer that is missing or fails
gets a row that says why. Rows go to `assets/results/attention.csv`: medians and the 20th and 80th percentiles in ms,
TFLOP/s on visited blocks, their percentage of the matrix product, and the memory beyond inputs and output.

Maps of Radial Attention are those that users get for the model, blocks of 128x64. Rows of before that was the default
are of 128x128: column `block` says which.

With `--clocks` each call is then repeated for so many seconds, and `--stretches` says how often; the stretches of a set
take turns. `steady_ms` is the median over them, at the median clock `sm_mhz` and power `watts` of the card, and a call
takes `joules`. A call whose clock falls is bound by power, and gains from doing less; what bounds one whose clock stays
is to be looked for elsewhere. `watts` and `joules` are empty where the card does not count energy, or stretches are too
short to read it. Rows with `steady_ms` but no `stretches` are of before: one stretch of each call, not in turn, with
the power that the driver told. Goals and tables do not count them.

Integer attention ("int8", "int8-fp8", "int8-int8") is timed with the quantization of its inputs; its error is relative,
in the mean square, and its bounds are those of `videosparse/benchmark/checks.py`, for it rounds on purpose. Rows
"quantize int8" and "quantize int8-fp8" are that quantization alone: the error is that of the rounded queries, keys or
values, and the memory includes them.

Peers: cuDNN and FlashAttention-2 through torch, FlexAttention compiled, FlashAttention-3 (`pip install fa3-fwd`) and
FlashAttention-4 (`pip install -e ".[fa4]"`). Ours runs as it does for users; "portable" is its kernel for any GPU.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import os
import re
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from videosparse.benchmark.checks import check_backward, check_forward, check_integers, check_quantize, check_sums
from videosparse.benchmark.contenders import CONTENDERS, INTEGERS, QUANTIZE, Call, Missing
from videosparse.benchmark.gauge import COLUMNS as STEADY
from videosparse.benchmark.gauge import LEAST_SPAN, SETTLING, Gauge, steady_columns
from videosparse.benchmark.problems import Entry, Inputs, Problem, Workload
from videosparse.benchmark.rows import WHERE, environment, read_rows, version, write_rows
from videosparse.benchmark.timing import interleave, megabytes, memory_of, timed_columns
from videosparse.cases import CASES
from videosparse.generation.output import check_place
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.base import BLOCK

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/attention.csv"
DENSITIES = (0.5, 0.25, 0.1, 0.05)
ROUNDS = 15
SET_SECONDS = 20.0
STRETCHES = 5
CEILING = 8192
DEVICE = torch.device("cuda")
# products ahead of every call, 1.4 ms each on an H200
HEATING = 10
PACKAGES = {"fa3": "fa3-fwd", "fa4": "flash-attn-4", "cudnn": "torch", "fa2": "torch", "flex": "torch"}
COLUMNS = (
    "set", "case", "tokens", "batch", "heads", "head_dim", "dtype", "pass", "kernel", "version", "policy", "share",
    "block", "density", "error", "allowed", "p20_ms", "p50_ms", "p80_ms", "tflops", "ceiling_tflops",
    "percent_of_ceiling", "extra_mb", "extra_percent", "lists_mb", "rounds", *STEADY, "note", *WHERE,
)  # fmt: skip


@dataclass(frozen=True)
class BenchSet:
    """Calls that are timed in turn. `what` is "forward", "backward", "forward+backward", "sums" or "index"."""

    what: str
    label: str
    workload: Workload
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        return f"{self.what} {self.workload.name} {self.label}"


def workloads() -> dict[str, Workload]:
    """By short name."""
    square, wide = TokenLayout(VideoGrid(16, 40, 48)), CASES["wan2.1-14b 720x1280x81"].layout()
    found = {
        "12x30720": Workload("12x30720", square, 12, share="per head"),
        "12x30720 d64": Workload("12x30720 d64", square, 12, head_dim=64, share="per head"),
        "40x75600 d64": Workload("40x75600 d64", wide, 40, head_dim=64),
    }
    for name in (
        "wan2.1-14b 480x832x81", "wan2.1-14b 720x1280x81", "wan2.1-14b 720x1280x161", "wan2.1-14b 720x1280x321",
        "wan2.2-5b 704x1280x121", "hunyuan-video 720x1280x129", "mochi 480x848x163",
    ):  # fmt: skip
        case = CASES[name]
        found[name] = Workload(name, case.layout(), case.model.heads, case.model.head_dim)
    return found


def sparse(kernels: str, densities: tuple[float, ...] = DENSITIES, policy: str = "uniform", **kw: Any) -> list[Entry]:
    return [Entry(kernel, policy, density, **kw) for density in densities for kernel in kernels.split()]


def sets() -> list[BenchSet]:
    """Everything there is to time, what the goals need first."""
    known = workloads()
    small, large = known["12x30720"], known["wan2.1-14b 720x1280x81"]
    narrow, large_narrow = known["12x30720 d64"], known["40x75600 d64"]
    dense = [Entry(kernel) for kernel in ("cudnn", "fa3", "fa4", "fa2", "ours")]
    full = [Entry("ours", "full"), Entry("fa4", "full"), Entry("flex", "full")]
    found: list[tuple[str, str, Workload, list[Entry]]] = []
    # dense calls of the large size take 200 ms, sparse ones 10: a set of each, so that rounds are short
    found.append(("forward", "128x128", large, sparse("ours fa4 flex")))
    found.append(("forward", "whole", large, [*dense, *full]))
    found.append(("forward", "128x128", small, [*dense, *full, *sparse("ours portable fa4 flex")]))
    for workload in (large, small):
        narrower = [*sparse("ours fa4", block=(128, 64)), *sparse("ours"), Entry("cudnn")]
        found.append(("forward", "128x64", workload, narrower))
    found += [("forward", label, workload, entries) for label, workload, entries in _integers(large, small)]
    kinds = ("uniform", "two dense rows", "u^2")
    skew = [e for kind in kinds for e in sparse("ours fa4", (0.1, 0.25), kind)]
    found.append(("forward", "skew", small, [*skew, Entry("cudnn")]))
    # ours alone: rows of FlashAttention-4 here would stand for those of 128x128 in the goals about equal rows
    skew = [e for kind in kinds for e in sparse("ours", (0.1, 0.25), kind)]
    found.append(("forward", "skew", replace(large, share="per head"), [*skew, Entry("cudnn")]))
    for workload in (narrow, large_narrow):
        entries = [*dense, *full[:2], *sparse("ours fa4 flex", (0.25, 0.1))]
        found.append(("forward", "head_dim 64", workload, entries))
    gradients = [Entry(k) for k in ("cudnn", "fa4", "fa2", "ours")] + sparse("ours fa4", (0.25, 0.1))
    found += [(what, "128x128", small, gradients) for what in ("backward", "forward+backward")]
    # without FlashAttention-2, whose backward takes a second there
    found.append(("backward", "128x128", large, [e for e in gradients if e.kernel != "fa2"]))
    found += [("sums", "128x128", w, [Entry("ours"), Entry("block_sums")]) for w in (small, large)]
    found.append(("sums", "64x64", small, [Entry("ours"), Entry("block_sums", block=(64, 64))]))
    index = [Entry("index", "radial", block=block) for block in (BLOCK, (64, 64))]
    found.append(("index", "build", known["wan2.1-14b 720x1280x321"], index))
    found.append(
        ("forward+backward", "128x128", large, [Entry("cudnn"), Entry("fa4"), *sparse("ours fa4", (0.25, 0.1))])
    )
    for workload in known.values():
        if workload.name in CASES:
            entries = [Entry("cudnn"), Entry("ours"), *sparse("ours fa4", (1.0,), "radial", block=BLOCK)]
            found.append(("forward", "radial", workload, entries))
    found.append(("forward", "128x128", narrow, [*dense, *sparse("ours portable fa4")]))
    return [BenchSet(what, label, workload, tuple(entries)) for what, label, workload, entries in found]


def _integers(large: Workload, small: Workload) -> Iterator[tuple[str, Workload, list[Entry]]]:
    """Sets of integer attention. INT8 values are slow, and have one of their own, beside the same calls in bf16."""
    dense = [Entry(kernel) for kernel in ("cudnn", "fa3", "fa4", "ours")]
    fast = [Entry(kernel) for kernel in (*INTEGERS[:2], *QUANTIZE)]
    for workload, shares in ((large, (0.5, 0.3, 0.25, 0.2, 0.1)), (small, (0.5, 0.25, 0.1))):
        yield "integers", workload, [*dense, *fast, *sparse("ours int8 int8-fp8", shares)]
        yield "integer values", workload, [Entry("ours"), Entry("int8-int8"), *sparse("ours int8-int8", shares)]


@dataclass(eq=False)
class Contestant:
    """An entry that is ready to be timed, or why it is not."""

    entry: Entry
    row: dict[str, Any]
    flops: float = 0.0
    call: Call | None = None


def prepare(what: str, p: Problem) -> Contestant:
    """Run an entry once, check what it computed, and measure its memory."""
    found = Contestant(p.entry, _row_of(what, p))
    try:
        call, check, factor = _runner(what, p)
        # the output takes the memory of these, which otherwise may hold the output of the kernel before
        del [torch.full_like(x, torch.nan) for x in p.qkv][:]
        first = call()
        found.row["lists_mb"] = megabytes(p.index.bytes) if p.index is not None else ""
        found.row["error"], found.row["allowed"] = (f"{x:.2e}" for x in check(first)) if check else ("", "")
        if check and not float(found.row["error"]) <= float(found.row["allowed"]):
            found.row["note"] = "error above allowed: not timed"
            return found
        del first
        found.row |= memory_of(call, p)
        found.call, found.flops = call, factor * p.pairs * p.q.shape[3]
    except Missing as reason:
        found.row["note"] = f"missing: {reason}"
    except Exception as error:
        traceback.print_exc()
        found.row["note"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return found


def _runner(what: str, p: Problem) -> tuple[Call, Callable[[Any], tuple[float, float]] | None, float]:
    """(the call to time, its error check, floating-point operations for each pair and element of head_dim)."""
    if what in ("forward", "sums", "index"):
        call = CONTENDERS[p.entry.kernel](p)
        if p.entry.kernel == "index":
            return call, None, 0.0
        if p.entry.kernel == "block_sums":
            return call, partial(check_sums, p), 2.0
        if p.entry.kernel in QUANTIZE:
            return call, partial(check_quantize, p), 0.0
        if p.entry.kernel in INTEGERS:
            return call, partial(check_integers, p), 4.0
        return call, partial(check_forward, p), 4.0
    leaves = [x.detach().requires_grad_() for x in p.qkv]
    p = replace(p, q=leaves[0], k=leaves[1], v=leaves[2])
    grad = torch.randn(p.q.shape, device=p.q.device, dtype=p.q.dtype)
    forward = CONTENDERS[p.entry.kernel](p)
    check = partial(check_backward, p, grad_out=grad)
    if what == "backward":
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), check, 10.0
    return lambda: torch.autograd.grad(forward(), leaves, grad), check, 14.0


def _row_of(what: str, p: Problem) -> dict[str, Any]:
    entry, workload = p.entry, p.workload
    name = PACKAGES.get(entry.kernel, "videosparse")
    plain = entry.policy == "dense" and entry.kernel != "block_sums"
    return {
        "case": workload.name, "tokens": p.layout.length, "batch": p.q.shape[0], "heads": workload.heads,
        "head_dim": workload.head_dim, "dtype": str(p.q.dtype).removeprefix("torch."), "pass": what,
        "kernel": entry.kernel, "version": version(name), "policy": entry.policy,
        "share": "" if p.block_map is None else workload.share if entry.policy != "radial" else "shared",
        "block": "" if plain else "x".join(map(str, entry.block)),
        "density": f"{p.density:.4f}",
    }  # fmt: skip


def run_set(
    bench: BenchSet,
    rounds: int,
    seconds: float,
    kernels: str | None = None,
    clocks: float = 0.0,
    stretches: int = STRETCHES,
) -> list[dict[str, Any]]:
    """The rows of a set.

    Args:
        bench: what to time.
        rounds: of calls in turn; fewer where they take longer than `seconds`.
        seconds: for these rounds.
        kernels: a pattern that names of kernels must match; None takes all.
        clocks: seconds of a stretch in which one call alone is repeated; 0 for no stretches.
        stretches: of each call, where `clocks` is not 0.
    """
    inputs = Inputs(bench.workload, DEVICE, torch.bfloat16, int.from_bytes(os.urandom(4), "little"))
    wanted = [e for e in bench.entries if kernels is None or re.search(kernels, e.kernel)]
    ready = []
    for entry in wanted:
        ready.append(prepare(bench.what, inputs.of(entry)))
        print(f"  {_line(ready[-1].row)}", flush=True)
    a, b = (torch.randn(CEILING, CEILING, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[Any, Call] = {c: c.call for c in ready if c.call is not None}
    # maps and lists are made by the CPU, too, which work ahead of the call would hide
    before = torch.cuda.synchronize if bench.what == "index" else partial(_heat, a, b)
    times = interleave({**calls, "ceiling": lambda: a @ b}, rounds, seconds, before)
    ceiling = 2 * CEILING**3 / statistics.median(times["ceiling"]) / 1e9
    steady = steady_columns(calls, clocks, stretches) if clocks else {}
    for contestant in calls:
        contestant.row |= timed_columns(times[contestant], contestant.flops, ceiling) | steady.get(contestant, {})
        print(f"  {_line(contestant.row)}", flush=True)
    return [{"set": bench.name, **contestant.row} for contestant in ready]


def _heat(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same work ahead of every call."""
    for _ in range(HEATING):
        a @ b


def merged(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with those of one set that was timed now. They take the place of its earlier ones on this card if each of
    those was timed again: rows compare only within one run of a set, so a part of a set takes no row's place.
    """

    def same(row: dict[str, Any]) -> bool:
        return all((row.get(name) or "") == (found[0].get(name) or "") for name in ("set", "gpu"))

    def timed(of: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
        calls = ("kernel", "policy", "share", "block")  # densities of random maps are not the same to the digit
        return Counter(tuple(row.get(name) or "" for name in calls) for row in of if row.get("p50_ms"))

    before = [row for row in rows if found and same(row)]
    kept = [row for row in rows if row not in before] if timed(before) <= timed(found) else rows
    return [*kept, *found]


def _line(row: dict[str, Any]) -> str:
    """A row for people."""
    what = f"{row['kernel']:17} {row['policy']:14} {row['block']:8} {row['density']}"
    if "p50_ms" in row:
        rate = f"{row['tflops']:>6} TFLOP/s {row['percent_of_ceiling']:>5} %" if "tflops" in row else ""
        steady = ""
        if "steady_ms" in row:
            spread = f"({row['steady_p20_ms']}..{row['steady_p80_ms']})"
            steady = f"  repeated {row['steady_ms']} ms {spread} at {row['sm_mhz']} MHz, {row.get('watts', '?')} W"
        spread = f"({row['p20_ms']}..{row['p80_ms']})"
        return f"{what}  {row['p50_ms']:>9} ms {spread} {rate} of {row['ceiling_tflops']}{steady}"
    text = f"error {row['error']} of {row['allowed']}" if "error" in row else ""
    return f"{what}  {text} {row.get('note', '')}"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier run.

    Raises:
        ValueError: they cannot be read, or are another program's.
    """
    rows = read_rows(path, ("set", "kernel", "p50_ms")) if path.exists() else []
    other = [str(name) for row in rows for name in row if name not in COLUMNS]
    if other:
        raise ValueError(f"{path} has a column {other[0]}, which is not of this program; give another --output.")
    return rows


def chosen(pattern: str) -> Iterator[BenchSet]:
    yield from (s for s in sets() if re.search(pattern, s.name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of the sets")
    parser.add_argument("--only", default="", metavar="REGEX", help="sets whose name matches")
    parser.add_argument("--kernels", metavar="REGEX", help="kernels whose name matches")
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no set after this long")
    parser.add_argument("--set-seconds", type=float, default=SET_SECONDS, help="time for the rounds of one set")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--clocks", type=float, default=0.0, metavar="SECONDS",
        help=f"also repeat each call so long, in each of its --stretches; takes (SECONDS + {SETTLING:g} to settle) x "
        "stretches x calls of a set; watts and joules stay empty where the card does not count energy, and below some "
        f"{LEAST_SPAN + 0.5:g} seconds",
    )  # fmt: skip
    parser.add_argument("--stretches", type=int, default=STRETCHES, help="of each call, with --clocks; goals need two")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    for name in ("only", "kernels"):
        try:
            re.compile(getattr(args, name) or "")
        except re.error as error:
            parser.error(f"--{name} must be a regular expression ({error} in {getattr(args, name)!r}).")
    for name in ("rounds", "stretches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1 (got {getattr(args, name)}).")
    for name in ("seconds", "set_seconds"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be a positive number (got {getattr(args, name)}).")
    if not 0 <= args.clocks < float("inf"):
        parser.error(f"--clocks must be seconds, 0 for none (got {args.clocks}).")
    if not list(chosen(args.only)):
        parser.error(f"--only {args.only!r} matches no set; --list names them.")
    if args.list:
        print("\n".join(s.name for s in chosen(args.only)))
        return 0
    if args.kernels and not any(re.search(args.kernels, e.kernel) for s in chosen(args.only) for e in s.entries):
        parser.error(f"--kernels {args.kernels!r} matches no kernel of these sets.")
    if (args.only or args.kernels) and args.output.exists() and not args.append:
        parser.error(f"{args.output} would lose its other rows; give --append, or another --output.")
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    check_place(args.output)
    if args.clocks:
        try:
            Gauge()
        except ModuleNotFoundError:
            parser.error("--clocks reads them with nvidia-ml-py; pip install nvidia-ml-py.")
    start, where = time.perf_counter(), environment(args.commit)
    rows: list[dict[str, Any]] = [*read(args.output)] if args.append else []
    failed = []
    for bench in chosen(args.only):
        if time.perf_counter() - start > args.seconds:
            print(f"not run for want of time: {bench.name}")
            continue
        print(f"{bench.name}  (at {time.perf_counter() - start:.0f} s)", flush=True)
        try:
            found = run_set(bench, args.rounds, args.set_seconds, args.kernels, args.clocks, args.stretches)
            rows = merged(rows, [row | where for row in found])
            write_rows(args.output, rows, COLUMNS)
        except Exception:  # one set, out of memory say, must not take the others along
            traceback.print_exc()
            failed.append(bench.name)
        torch.cuda.empty_cache()
    for name in failed:
        print(f"Failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_program(main, (ValueError, OSError))  # rows of before, files
