"""What token orders cost: queries, keys and values in another order, and the output back in raster order.

    python eval/bench_order.py                     both cases, about half a minute of one H200
    python eval/bench_order.py --only hunyuan      the cases whose name matches

Times, on the grids of real models, in bf16, with a random order for every head, the parts of a sparse attention call
that an order touches, with it and without:
    norm        `norm_rotate` of queries and keys
    values      one copy; where text is joined, that copy is made without an order, too
    attention   `attend` on a random map; "copied" writes in order and copies afterwards, as other backends have to
    sum         what the order adds to norm, values and attention, in percent of attention without
    copy        a plain copy of as many bytes as values have
Everything in a case is timed in turn, in a new random turn every round: a power-limited card multiplies slower after it
has multiplied than after it has copied. What an order does is compared bit by bit with the same call
without, and attention without is checked against fp64 on some rows. Rows go to `assets/results/reorder.csv`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videosparse.benchmark.checks import check_forward
from videosparse.benchmark.problems import Entry, Inputs, Problem, Workload
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.benchmark.timing import quantiles
from videosparse.cases import CASES
from videosparse.kernels import Stream, attend, norm_rotate, reorder
from videosparse.layout import TokenLayout
from videosparse.ordering import AXIS_ORDERS, TokenOrder

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/reorder.csv"
RUNS = ("wan2.1-14b 720x1280x81", "hunyuan-video 720x1280x129")
ROUNDS = 40
COLUMNS = (
    "case", "part", "form", "tokens", "text", "heads", "head_dim", "dtype", "density", "error", "allowed", "p20_ms",
    "p50_ms", "p80_ms", "percent", "rounds", "note", *WHERE,
)  # fmt: skip

Call = Callable[[], Any]
Key = tuple[str, str]


@dataclass(eq=False)
class Parts:
    """The inputs of one case: projections of video and text, and q, k, v of a sparse call.

    Args:
        problem: the sparse call; its q, k, v stand for any order.
        order: a random axis order for each head.
        video, text: what is normed; `text` is None where the sequence has none.
        rotary: cos and sin [S, 1, D / 2].
    """

    problem: Problem
    order: TokenOrder
    video: Stream
    text: Stream | None
    rotary: tuple[torch.Tensor, torch.Tensor]

    @property
    def layout(self) -> TokenLayout:
        """Of the sparse call: text starts on a fresh block."""
        return self.problem.layout

    def norm(self, order: TokenOrder | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys [1, L, H, D]."""
        start = None if self.text is None else self.layout.text_start
        heads = self.order.heads
        return norm_rotate(self.video, self.text, heads=heads, rotary=self.rotary, text_start=start, order=order)

    def values(self, order: TokenOrder | None) -> torch.Tensor:
        """Values as `project` makes them from projections [B, S, H * D]; those of queries stand in for them."""
        video, layout = self.video.q.unflatten(2, (self.order.heads, -1)), self.layout
        text = None if self.text is None else self.text.q.unflatten(2, (self.order.heads, -1))
        if order is not None:
            return reorder(video, order, layout, text=text)
        if text is None:
            return video
        gap = layout.text_start - layout.video
        return torch.cat([video, video.new_zeros(1, gap, *video.shape[2:]), text], 1)

    def attention(self, order: TokenOrder | None) -> torch.Tensor:
        """The sparse call."""
        return attend(*self.problem.qkv, layout=self.layout, index=self.problem.index, order=order)

    def copied(self) -> torch.Tensor:
        """The sparse call, and its output brought back to raster order by a copy."""
        return reorder(self.attention(None), self.order, self.layout, inverse=True)

    def calls(self) -> dict[Key, Call]:
        """What is timed, by part and form."""
        found: dict[Key, Call] = {
            ("norm", "raster"): lambda: self.norm(None),
            ("norm", "ordered"): lambda: self.norm(self.order),
            ("values", "ordered"): lambda: self.values(self.order),
            ("attention", "raster"): lambda: self.attention(None),
            ("attention", "ordered"): lambda: self.attention(self.order),
            ("attention", "copied"): self.copied,
            ("copy", ""): self.problem.v.clone,
        }
        if self.text is not None:
            found["values", "raster"] = lambda: self.values(None)
        return found


def make_parts(name: str, density: float, device: torch.device, seed: int) -> Parts:
    case = CASES[name]
    torch.manual_seed(seed)
    heads, head_dim = case.model.heads, case.model.head_dim
    workload = Workload(name, case.layout(), heads, head_dim)
    problem = Inputs(workload, device, torch.bfloat16, seed).of(Entry("ours", "uniform", density))
    layout = problem.layout
    codes = torch.randint(len(AXIS_ORDERS), (heads,)).tolist()
    across = case.model.family == "wan"
    angles = torch.rand(layout.video, 1, head_dim // 2, device=device) * 6.3

    def stream(tokens: int) -> Stream:
        q, k = (torch.randn(1, tokens, heads * head_dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        weights = (torch.randn(heads * head_dim if across else head_dim, device=device).bfloat16() for _ in range(2))
        return Stream(q, k, *weights, 1e-6)

    text = stream(layout.text) if layout.text else None
    order = TokenOrder(layout.grid, tuple(codes))
    return Parts(problem, order, stream(layout.video), text, (angles.cos(), angles.sin()))


def check(parts: Parts) -> dict[Key, dict[str, str]]:
    """Columns of the calls: what an order gives has to be that of raster order, moved, to the bit."""
    order, layout = parts.order, parts.layout
    found: dict[Key, dict[str, str]] = {}
    pairs = zip(parts.norm(order), parts.norm(None), strict=True)
    found["norm", "ordered"] = _same(all(torch.equal(x, order.apply(y, layout)) for x, y in pairs))
    joined = parts.values(None)
    found["values", "ordered"] = _same(torch.equal(parts.values(order), order.apply(joined, layout)))
    raster = parts.attention(None)
    error, allowed = check_forward(parts.problem, raster)
    found["attention", "raster"] = {"error": f"{error:.2e}", "allowed": f"{allowed:.2e}"}
    if not error <= allowed:
        found["attention", "raster"]["note"] = "error above allowed: not timed"
    expected = order.restore(raster, layout)
    found["attention", "ordered"] = _same(torch.equal(parts.attention(order), expected))
    found["attention", "copied"] = _same(torch.equal(parts.copied(), expected))
    return found


def _same(equal: bool) -> dict[str, str]:
    return {"error": "0", "allowed": "0"} if equal else {"note": "not the same bits: not timed"}


def shuffled(calls: dict[Key, Call], rounds: int, seed: int = 0) -> dict[Key, list[float]]:
    """Milliseconds of each call; every round takes them in another order."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    turn, keys = random.Random(seed), list(calls)
    for number in range(-2, rounds):  # two rounds warm up
        turn.shuffle(keys)
        events = {key: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for key in keys}
        for key in keys:
            events[key][0].record()
            calls[key]()
            events[key][1].record()
        torch.cuda.synchronize()
        if number >= 0:
            for key, (start, end) in events.items():
                times[key].append(start.elapsed_time(end))
    return times


def added(times: dict[Key, list[float]]) -> dict[str, str]:
    """Columns of the sum: what the order adds, in ms and in percent of attention without."""
    parts = ("norm", "values", "attention")
    needed = [(part, "ordered") for part in parts] + [("norm", "raster"), ("attention", "raster")]
    if any(key not in times for key in needed):
        return {"note": "a part is missing"}

    def median(part: str, form: str) -> float:
        return quantiles(times[part, form])[1] if (part, form) in times else 0.0

    extra = sum(median(part, "ordered") - median(part, "raster") for part in parts)
    return {"p50_ms": f"{extra:.4f}", "percent": f"{100 * extra / median('attention', 'raster'):.2f}"}


def run(name: str, density: float, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """The rows of a case."""
    parts = make_parts(name, density, device, seed=0)
    found = check(parts)
    calls = {key: call for key, call in parts.calls().items() if "note" not in found.get(key, {})}
    times = shuffled(calls, rounds)
    common = {
        "case": name, "tokens": parts.layout.video, "text": parts.layout.text, "heads": parts.order.heads,
        "head_dim": parts.problem.q.shape[3], "dtype": "bfloat16", "density": f"{parts.problem.density:.3f}",
    }  # fmt: skip
    for key, row in times.items():
        p20, p50, p80 = quantiles(row)
        columns = {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}", "rounds": str(len(row))}
        found[key] = found.get(key, {}) | columns
    found["sum", "ordered"] = added(times)
    return [common | {"part": part, "form": form} | columns for (part, form), columns in found.items()]


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    share = f"{row['percent']} % of attention" if "percent" in row else ""
    what = f"{row['case']} {row['part']:9} {row['form']:8} {row.get('p50_ms', '-'):>8} ms {share}"
    return f"{what} {row.get('note', '')}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--density", type=float, default=0.2, help="kept / all blocks of the sparse call")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    where = environment(args.commit)
    for name in RUNS:
        if re.search(args.only, name):
            with torch.no_grad():
                made = run(name, args.density, args.rounds, torch.device("cuda"))
            rows += [row | where for row in made]
            write_rows(args.output, rows, COLUMNS)
            print("\n".join(map(line, made)), flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    run_program(main)
