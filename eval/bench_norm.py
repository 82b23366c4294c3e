"""What stands between projections and attention on a GPU: norm, rotary embedding and joining with text.

    python eval/bench_norm.py                     all cases, about two minutes of one H200
    python eval/bench_norm.py --only hunyuan      the cases whose name matches

Times `project` of each model family with its linear layers left out (they return what was made before), on the grids of
real models, sparse layouts (text on a fresh block), bf16 and random inputs that are new in every run:
    steps       module by module, as Diffusers does it
    compiled    the same under torch.compile
    fused       one kernel, `videosparse.kernels.norm_rotate`
    copy        a plain copy of as many bytes as have to be read and written
Everything in a case is timed in turn, round after round. A row is timed after the error of its own output was checked
against fp64, on some tokens: at most twice that of the steps. Rows go to `assets/results/norm_rotate.csv`: medians and
the 20th and 80th percentiles in ms, GB/s of the bytes that have to move, and memory beyond inputs and output.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import re
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.normalization import MochiRMSNorm, RMSNorm

from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.cases import CASES, Case
from videosparse.kernels import KernelOptions
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.layout import TokenLayout
from videosparse.models import FAMILIES
from videosparse.policies.base import LayerPlan, Mode

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/norm_rotate.csv"
ROUNDS = 25
EPS = 1e-6
BLOCK = (128, 128)
COLUMNS = (
    "case", "form", "tokens", "text", "gap", "batch", "heads", "head_dim", "dtype", "kernel", "policy", "density",
    "error", "allowed", "p20_ms", "p50_ms", "p80_ms", "mb_moved", "gb_per_s", "percent_of_copy", "extra_mb", "rounds",
    "note", *WHERE,
)  # fmt: skip
RUNS = (
    ("wan2.1-14b 720x1280x81", ""), ("wan2.1-1.3b 480x832x81", ""), ("hunyuan-video 720x1280x129", "dual"),
    ("hunyuan-video 720x1280x129", "single"), ("mochi 480x848x163", ""),
)  # fmt: skip

Out = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Given(torch.nn.Module):
    """A linear layer that returns what was made before."""

    def __init__(self, made: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("made", made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.made


class Attention(torch.nn.Module):
    """What `project` of a family needs of an attention module, in bf16.

    Args:
        case: model and grid.
        form: "single" for HunyuanVideo's blocks that project both streams at once.
        layout: lengths of video and text.
        device: where.
    """

    def __init__(self, case: Case, form: str, layout: TokenLayout, device: torch.device) -> None:
        super().__init__()
        family, self.heads, head_dim = case.model.family, case.model.heads, case.model.head_dim
        single = form == "single"
        for name in "qkv":
            length = layout.video + layout.text if single else layout.video
            self.add_module(f"to_{name}", Given(_rows(length, self.heads * head_dim, device)))
            text = None if single or not layout.text else Given(_rows(layout.text, self.heads * head_dim, device))
            self.add_module(f"add_{name}_proj", text)
        norm = {"wan": torch.nn.RMSNorm, "hunyuan_video": RMSNorm, "mochi": MochiRMSNorm}[family]
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            module = norm(self.heads * head_dim if family == "wan" else head_dim, eps=EPS)
            torch.nn.init.normal_(module.weight, 1.0, 0.5)
            self.add_module(name, module.to(device, torch.bfloat16).requires_grad_(False))

    def given(self, names: str) -> list[torch.Tensor]:
        """The projections of video and text whose names are in `names`, such as "qk"."""
        layers = [getattr(self, form.format(n)) for n in names for form in ("to_{}", "add_{}_proj")]
        return [layer.made for layer in layers if layer is not None]


def _rows(length: int, width: int, device: torch.device) -> torch.Tensor:
    """bf16 [1, length, width], rows of different size, which is what a norm is for."""
    return (torch.randn(1, length, width, device=device) * torch.rand(1, length, 1, device=device) * 4).bfloat16()


@dataclass(eq=False)
class Problem:
    """One call of `project`.

    Args:
        case: model and grid.
        layout: of a sparse call.
        attn: what is projected, and the norms.
        angles: fp32 [S, 1 or H, D / 2].
        rotary: (cos, sin) as the transformer passes them.
        hidden: [1, S + T, 1], in place of hidden states, which only linear layers read.
    """

    case: Case
    layout: TokenLayout
    attn: Attention
    angles: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    hidden: torch.Tensor

    def projector(self, fused_norm: str) -> Callable[[], Out]:
        """A call that makes q, k and v [B, L, H, D]."""
        layout, family = self.layout, FAMILIES[self.case.model.family]
        plan = LayerPlan(Mode.SPARSE, layout, options=KernelOptions(fused_norm=fused_norm))
        video, text = self.hidden[:, : layout.video], self.hidden[:, layout.video :] if layout.text else None
        return lambda: family.project(self.attn, video, text, self.rotary, plan)

    def bytes_moved(self, out: Out) -> int:
        """What has to be read and written at least. Angles that come twice share their cache lines."""
        copied = not _same_memory(out[2], self.attn.to_v.made)
        tensors = [*out[: 3 if copied else 2], *self.attn.given("qkv" if copied else "qk"), *self.rotary]
        return sum(map(_bytes, tensors))

    def truth(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """q and k [1, R, H, D] of video tokens [R] in float64, straight from the formulas."""
        turns = torch.complex(*(x.double() for x in (self.angles[tokens].cos(), self.angles[tokens].sin())))
        found = []
        for name in "qk":
            weight = getattr(self.attn, f"norm_{name}").weight.double()
            rows = getattr(self.attn, f"to_{name}").made[:, tokens].double().unflatten(2, (-1, len(weight)))
            rows = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
            pairs = torch.view_as_complex(rows.flatten(2).unflatten(2, (self.attn.heads, -1, 2)).contiguous())
            found.append(torch.view_as_real(pairs * turns).flatten(3))
        return found


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _same_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def make_problem(name: str, form: str, device: torch.device) -> Problem:
    case = CASES[name]
    layout, model = case.layout().aligned(BLOCK), case.model
    own = model.family == "mochi"
    angles = torch.rand(layout.video, model.heads if own else 1, model.head_dim // 2, device=device) * 6.3
    cos, sin = angles.cos(), angles.sin()
    if not own:
        cos, sin = (x[:, 0].repeat_interleave(2, 1) for x in (cos, sin))
    if model.family == "wan":
        cos, sin = cos[None, :, None], sin[None, :, None]
    hidden = angles.new_zeros(1, layout.video + layout.text, 1)
    return Problem(case, layout, Attention(case, form, layout, device), angles, (cos, sin), hidden)


def contenders(problem: Problem) -> dict[str, Callable[[], Out]]:
    steps = problem.projector("off")
    compiled = torch.compile(steps, fullgraph=True, dynamic=False)
    return {"steps": steps, "fused": problem.projector("on"), "compiled": compiled}


def check(problem: Problem, out: Out, steps: Out) -> tuple[float, float]:
    """(largest error of some rows of q and k, the allowed one); text and gap count, too."""
    layout = problem.layout
    tokens = torch.randint(0, layout.video, (2048,), device=out[0].device)
    error, allowed = 0.0, 0.0
    for ours, plain, true in zip(out[:2], steps[:2], problem.truth(tokens), strict=True):
        error = max(error, worst_row(ours[:, tokens], true))
        allowed = max(allowed, allowed_error(true, plain[:, tokens]))
        end, plain_end = ours[:, layout.video :].double(), plain[:, layout.video :].double()
        # one rounding instead of three: a few units in the last place apart
        if not bool(((end - plain_end).abs() <= 0.02 * plain_end.abs()).all()):
            return float("nan"), allowed
    return error, allowed


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times in ms of every call, in turn; every round begins elsewhere."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-1, rounds):  # round -1 warms up
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in names}
        shift = number % len(names)
        for _ in range(3):  # work for the GPU while the host runs ahead: launching is no part of the times
            calls[names[shift]]()
        for name in names[shift:] + names[:shift]:
            events[name][0].record()
            calls[name]()
            events[name][1].record()
        torch.cuda.synchronize()
        if number >= 0:
            for name, (start, end) in events.items():
                times[name].append(start.elapsed_time(end))
    return times


def copier(size: int, device: torch.device) -> Callable[[], object]:
    """A call that reads and writes `size` bytes together."""
    source = torch.empty(size // 4, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def extra_bytes(problem: Problem, call: Callable[[], Out]) -> int:
    """Memory that a call takes beyond its inputs and what it returns."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    made = sum(_bytes(x) for x in out if not _same_memory(x, problem.attn.to_v.made))
    return torch.cuda.max_memory_allocated() - before - made


def checked(problem: Problem, call: Callable[[], Out], steps: Out) -> dict[str, str]:
    """Columns of a call that is not timed yet; with a note, it is not to be."""
    try:
        error, allowed = check(problem, call(), steps)
        found = {"error": f"{error:.2e}", "allowed": f"{allowed:.2e}"}
        if not error <= allowed:
            return found | {"note": "error above allowed: not timed"}
        return found | {"extra_mb": f"{extra_bytes(problem, call) / 1e6:.0f}"}
    except Exception as failure:  # one contender must not take the others along
        traceback.print_exc()
        return {"note": f"failed: {type(failure).__name__}: {str(failure)[:200]}"}


def run(name: str, form: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of a case."""
    device = torch.device("cuda")
    problem = make_problem(name, form, device)
    model, layout = problem.case.model, problem.layout
    steps = problem.projector("off")()
    moved = problem.bytes_moved(steps)
    calls = contenders(problem)
    found = {kernel: checked(problem, call, steps) for kernel, call in calls.items()}
    calls = {kernel: call for kernel, call in calls.items() if "note" not in found[kernel]}
    del steps
    times = interleave({**calls, "copy": copier(moved, device)}, rounds)
    common = {
        "case": name, "form": form, "tokens": layout.video, "text": layout.text,
        "gap": layout.text_start - layout.video if layout.text else 0, "batch": 1, "heads": model.heads,
        "head_dim": model.head_dim, "dtype": "bfloat16", "policy": "none", "rounds": rounds,
        "mb_moved": f"{moved / 1e6:.0f}",
    }  # fmt: skip
    for kernel, row in times.items():
        p20, p50, p80 = (statistics.quantiles(row, n=10)[i] for i in (1, 4, 7))
        found.setdefault(kernel, {}).update({
            "p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}",
            "gb_per_s": f"{moved / p50 / 1e6:.0f}",
            "percent_of_copy": f"{100 * statistics.median(times['copy']) / p50:.1f}",
        })  # fmt: skip
    return [common | {"kernel": kernel} | row for kernel, row in found.items()]


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    timed = (
        "{p50_ms:>8} ms {gb_per_s:>5} GB/s {percent_of_copy:>5} % of a copy".format(**row) if "p50_ms" in row else ""
    )
    errors = f"error {row['error']} of {row['allowed']}, {row.get('extra_mb', '?')} MB more" if "error" in row else ""
    what = f"{row['case']} {row['form']:6} {row['kernel']:8}"
    return f"{what} {timed} {errors} {row.get('note', '')}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    rows = []
    for name, form in RUNS:
        if re.search(args.only, f"{name} {form}"):
            with torch.no_grad():
                rows += run(name, form, args.rounds)
            print("\n".join(map(line, rows[-4:])), flush=True)
            torch.cuda.empty_cache()
    where = environment(args.commit)
    write_rows(args.output, [row | where for row in rows], COLUMNS)
    return 0


if __name__ == "__main__":
    run_program(main)
