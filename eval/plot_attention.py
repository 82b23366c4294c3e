"""Draw the rows of `eval/bench_attention.py`: rate against density, and time against length.

    python eval/plot_attention.py

Writes `assets/figures/attention_density.png` (TFLOP/s on visited blocks of every kernel, 128x128 blocks, the newest run
of each head size) and `assets/figures/attention_length.png` (milliseconds of ours with Radial Attention and of the
fastest dense kernel beside it, on the grids of real models). Needs matplotlib (`pip install -e ".[eval]"`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from videosparse.program import run_program

from matplotlib import pyplot as plt

from videosparse.benchmark.figures import save_figure
from videosparse.benchmark.kernel_tables import newest_run
from videosparse.benchmark.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "ours": "videosparse", "portable": "videosparse, portable kernel", "fa4": "FlashAttention-4",
    "fa3": "FlashAttention-3", "fa2": "FlashAttention-2", "cudnn": "cuDNN", "flex": "FlexAttention",
}  # fmt: skip
# one colour a kernel in every figure, readable without colour vision
COLOURS = {
    "ours": "#0072B2", "portable": "#56B4E9", "fa4": "#D55E00", "fa3": "#E69F00", "fa2": "#999999",
    "cudnn": "#009E73", "flex": "#CC79A7",
}  # fmt: skip

Row = dict[str, str]


def density_figure(rows: list[Row], path: Path, case: str = "12x30720") -> bool:
    """Rate against density; dense-only kernels are lines across. False without rows."""
    rows = newest_run(rows, f"forward {case} 128x128")
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for kernel, name in NAMES.items():
        own = sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: float(r["density"]))
        sparse = [r for r in own if r["policy"] in ("uniform", "full")]
        dense = [r for r in own if r["policy"] == "dense"]
        if sparse:
            points = [(float(r["density"]), float(r["tflops"])) for r in sparse]
            axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS[kernel], label=name)
        elif dense:
            rate = float(dense[0]["tflops"])
            axes.axhline(rate, color=COLOURS[kernel], linestyle="--", linewidth=1, label=f"{name} (dense)")
    axes.axhline(float(rows[0]["ceiling_tflops"]), color="black", linestyle=":", linewidth=1, label="matrix product")
    axes.set(xscale="log", xlabel="density (kept / all blocks)", ylabel="TFLOP/s on visited blocks", ylim=(0, None))
    axes.set_xticks([0.05, 0.1, 0.25, 0.5, 1], ["0.05", "0.1", "0.25", "0.5", "1"])
    axes.minorticks_off()
    _finish(
        figure, axes, rows[0], f"{rows[0]['heads']} heads x {int(rows[0]['tokens']):,} tokens x {rows[0]['head_dim']}"
    )
    save_figure(figure, path, 130)
    plt.close(figure)
    return True


def length_figure(rows: list[Row], path: Path) -> bool:
    """Time against length with Radial maps. False without rows."""
    cases = sorted({r["case"] for r in rows if r["set"].endswith(" radial") and r["p50_ms"]})
    points: dict[str, list[tuple[int, float]]] = {}
    last: Row | None = None
    for case in cases:
        for row in newest_run(rows, f"forward {case} radial"):
            if row["heads"] == "40":
                key = f"{row['kernel']} {row['block']}"  # none where attention is dense
                points.setdefault(key, []).append((int(row["tokens"]), float(row["p50_ms"])))
                last = row
    if last is None:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for key, pairs in points.items():
        kernel, block = key.split(" ")
        label = f"{NAMES[kernel]}, {f'Radial {block}' if block else 'dense'}"
        # ours in small points above the others' large ones: lines may coincide
        size, above = (4, 3) if kernel == "ours" else (9, 2)
        style = {"linestyle": "-" if block else "--", "marker": "o", "color": COLOURS[kernel]}
        axes.plot(*zip(*sorted(pairs), strict=True), label=label, markersize=size, zorder=above, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms for one attention call")
    lengths = sorted({tokens for pairs in points.values() for tokens, _ in pairs})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    _finish(figure, axes, last, "Wan2.1-14B, 40 heads x 128")
    save_figure(figure, path, 130)
    plt.close(figure)
    return True


def _finish(figure: plt.Figure, axes: plt.Axes, row: Row, title: str) -> None:
    axes.set_title(f"{title}, {row['dtype']}, {row['gpu']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "assets/results/attention.csv")
    parser.add_argument("--figures", type=Path, default=ROOT / "assets/figures")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.rows, ("set", "case", "kernel", "p50_ms", "run"))
    except ValueError as error:
        parser.error(str(error))
    args.figures.mkdir(parents=True, exist_ok=True)
    for name, draw in (("attention_density", density_figure), ("attention_length", length_figure)):
        path = args.figures / f"{name}.png"
        print(path if draw(rows, path) else f"{name}: no rows")
    return 0


if __name__ == "__main__":
    run_program(main)
