"""Attention on the CPU: dense against block-sparse, on the grids of the embedded model.

    python eval/bench_cpu.py

For each length: random q, k, v in fp32 (4 heads of 64, block 64), Radial maps at their default decay and at a low one.
The error of the sparse call against fp64 is checked before it is timed; dense is torch's own attention. Runs are
interleaved; medians and the 20th and 80th percentiles go to `assets/results/cpu_attention.csv`.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from videosparse.benchmark.rows import write_rows
from videosparse.cases import CASES
from videosparse.kernels import attend
from videosparse.policies import RadialPolicy

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/cpu_attention.csv"
SIZES = ("tiny-wan 128x128x33", "tiny-wan 128x128x81", "tiny-wan 128x128x321")
HEADS, DIM, THREADS = 4, 64, 2
CHECK_ROWS = 256


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile in ms."""
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return p20 * 1e3, statistics.median(times) * 1e3, p80 * 1e3


def error(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor
) -> tuple[float, float]:
    """Relative L2 error of some rows of `out`, and of eager fp32 on the same rows, against fp64.

    keep: bool [rows, tokens], which keys each of the rows reads.
    """
    rows = slice(out.shape[1] // 2, out.shape[1] // 2 + CHECK_ROWS)

    def eager(dtype: torch.dtype) -> torch.Tensor:
        scores = torch.einsum("blhd,bmhd->bhlm", q[:, rows].to(dtype), k.to(dtype)) * DIM**-0.5
        p = scores.masked_fill(~keep[rows], -torch.inf).softmax(-1)
        return torch.einsum("bhlm,bmhd->blhd", p, v.to(dtype))

    truth = eager(torch.float64)
    return tuple(float((x.double() - truth).norm() / truth.norm()) for x in (out[:, rows], eager(torch.float32)))  # type: ignore[return-value]


def rows_of(name: str) -> list[dict[str, object]]:
    case = CASES[name]
    layout = case.layout()
    length = layout.length
    q, k, v = (torch.randn(1, length, HEADS, DIM) for _ in range(3))
    rows = []
    for decay in (0.2, 0.05):
        policy = RadialPolicy(decay=decay, block=(64, 64), sink=decay == 0.2)
        block_map, index = policy.block_map(layout), policy.block_index(layout)

        def sparse(index=index) -> torch.Tensor:
            return attend(q, k, v, layout=layout, index=index)

        def dense() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

        keep = block_map.keep[0, 0].repeat_interleave(64, 0)[:length].repeat_interleave(64, 1)[:, :length]
        ours, eager = error(sparse(), q, k, v, keep)
        if not ours <= 2 * eager:
            raise SystemExit(f"{name}: error {ours:.2e} against fp64 is over twice that of eager fp32 ({eager:.2e}).")
        dense()
        repeats = 15 if length < 10_000 else 7
        pairs = [(seconds(dense), seconds(sparse)) for _ in range(repeats)]
        d20, d50, d80 = quantiles([d for d, _ in pairs])
        s20, s50, s80 = quantiles([s for _, s in pairs])
        rows.append({
            "case": name, "tokens": length, "heads": HEADS, "head_dim": DIM, "dtype": "fp32", "policy": "radial",
            "decay": decay, "sink": policy.sink, "block": "64x64", "density": round(block_map.density, 4),
            "error": f"{ours:.1e}", "eager_error": f"{eager:.1e}",
            "dense_ms": f"{d50:.1f}", "dense_p20": f"{d20:.1f}", "dense_p80": f"{d80:.1f}",
            "sparse_ms": f"{s50:.1f}", "sparse_p20": f"{s20:.1f}", "sparse_p80": f"{s80:.1f}",
            "speedup": f"{d50 / s50:.2f}", "baseline": "torch SDPA (CPU flash)",
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    where = {
        "cpu": platform.processor() or platform.machine(), "threads": THREADS, "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }  # fmt: skip
    with torch.no_grad():
        rows = [row | where for name in SIZES for row in rows_of(name)]
    write_rows(args.output, rows)


if __name__ == "__main__":
    run_program(main)
