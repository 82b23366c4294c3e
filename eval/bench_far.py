"""What smaller scores of far tokens (UltraViCo) cost an attention call.

    python eval/bench_far.py                       both lengths, about half a minute of one H200
    python eval/bench_far.py --only 161            the cases whose name matches

Times, on the grids of Wan2.1-14B at 720p in bf16, dense and on Radial's default map, in turn:
    best        the call as it is, by the kernel that users get
    portable    the same by the kernel for any GPU, which alone changes scores
    far         the call with `FarLogits(21)`, or `FarLogits(11)` where 21 latent frames are not beyond what was trained
A tenth of the model's heads stands for all: times grow with heads. Calls with changed scores are checked against fp64
on some rows before they are timed. Rows go to `assets/results/far_scores.csv`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from videosparse.benchmark.checks import picked_rows
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.benchmark.timing import interleave, quantiles
from videosparse.blocks import BlockMap
from videosparse.cases import CASES
from videosparse.defaults import block_for, radial_defaults
from videosparse.kernels import KernelOptions, attend, gpu
from videosparse.kernels.accuracy import measure
from videosparse.logits import FarLogits
from videosparse.policies.radial import RadialPolicy

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/far_scores.csv"
TRAINED = {"wan2.1-14b 720x1280x81": 11, "wan2.1-14b 720x1280x161": 21}
HEADS = 4
ROUNDS = 7
COLUMNS = (
    "case", "tokens", "heads", "attention", "density", "scores", "error", "allowed", "p20_ms", "p50_ms", "p80_ms",
    "over_best", "note", *WHERE,
)  # fmt: skip


def maps(name: str, device: torch.device) -> dict[str, BlockMap | None]:
    """None for dense, and Radial's map as users get it."""
    case = CASES[name]
    found = radial_defaults(case.model)
    policy = RadialPolicy(decay=found.decay, block=block_for(case.layout().grid), sink=found.sink)
    return {"dense": None, "radial": policy.static_map(case.layout(), device)}


def run(
    name: str, attention: str, block_map: BlockMap | None, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """The rows of a case with one kind of attention."""
    case = CASES[name]
    layout, logit = case.layout(), FarLogits(TRAINED[name])
    shape = (1, layout.length, HEADS, case.model.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    index = None if block_map is None else block_map.index()

    def call(changed: FarLogits | None) -> torch.Tensor:
        return attend(q, k, v, layout=layout, index=index, options=KernelOptions(logit=changed))

    def portable() -> torch.Tensor:
        with gpu.portable_only():
            return call(None)

    rows = picked_rows(layout.length, device)
    found = measure(call(logit), None, q, k, v, layout=layout, block_map=block_map, logit=logit, rows=rows)
    calls: dict[str, Callable[[], Any]] = {"best": lambda: call(None), "portable": portable}
    if found.ok:
        calls["far"] = lambda: call(logit)
    times = {key: quantiles(of) for key, of in interleave(calls, rounds, float("inf")).items()}
    common = {
        "case": name, "tokens": layout.length, "heads": HEADS, "attention": attention,
        "density": f"{1.0 if block_map is None else float(block_map.density):.4f}",
    }  # fmt: skip
    made = []
    for scores in ("best", "portable", "far"):
        row = common | {"scores": scores}
        if scores == "far":
            row |= {"error": f"{found.error:.2e}", "allowed": f"{found.allowed:.2e}"}
        if scores in times:
            p20, p50, p80 = times[scores]
            row |= {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}"}
            row |= {"over_best": f"{p50 / times['best'][1]:.3f}"}
        else:
            row["note"] = "error above allowed: not timed"
        made.append(row)
    return made


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
    rows: list[dict[str, Any]] = []
    where, device = environment(args.commit), torch.device("cuda")
    for name in (name for name in TRAINED if re.search(args.only, name)):
        for attention, block_map in maps(name, device).items():
            made = run(name, attention, block_map, args.rounds, device)
            rows += [row | where for row in made]
            write_rows(args.output, rows, COLUMNS)
            for row in made:
                print(f"{name} {attention:7} {row['scores']:9} {row.get('p50_ms', '-'):>9} ms {row.get('note', '')}")
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    run_program(main)
