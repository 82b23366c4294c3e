"""Draw what token orders and integers do to attention and to videos, by density.

    python eval/plot_reordering.py

Writes `assets/figures/reordering.png`. Left: relative L2 error of attention's output by static maps, from the rows of
`eval/measure_reordering.py`, the longest video. Right: PSNR of whole videos against dense, from those of
`eval/compare_methods.py` at 81 frames of 128x128. Needs matplotlib (`pip install -e ".[eval]"`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
from videosparse.program import run_program

from matplotlib import pyplot as plt

from videosparse.benchmark.figures import finish
from videosparse.benchmark.rows import read_rows
from videosparse.benchmark.tables import COMPARED_AT, usual
from videosparse.evaluation.table import read_table

ROOT = Path(__file__).resolve().parents[1]
# one colour for the order of tokens, one line for the kind of numbers
COLOURS = {"reordered": "#0072B2", "by mass": "#009E73", "raster": "#D55E00", "random": "#999999"}
ORDERS = {"paro": "reordered", "paro-mass": "by mass", "paro-raster": "raster", "random": "random"}
LINES = {"": "-", "int8": "--", "int8-fp8": ":", "int8-int8": "-."}

Row = dict[str, str]


def errors(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(density, error) by (order of tokens, integers), of static maps."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        order, _, kind = row["method"].partition(", ")
        if kind == "static":
            point = float(row["density"]), float(row["error"])
            found.setdefault((order, row["quant"]), []).append(point)
    return found


def fidelities(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(density, mean PSNR) by (order of tokens, integers), of videos of plans and of random blocks."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    rows = [row for row in usual(rows) if row["method"] in ORDERS]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        videos = [r for r in rows if r["setting"] == setting]
        point = float(videos[0]["video_density"]), fmean(float(r["psnr_db"]) for r in videos)
        found.setdefault((ORDERS[videos[0]["method"]], videos[0]["quant"]), []).append(point)
    return found


def panel(axes: plt.Axes, lines: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    for (order, quant), points in lines.items():
        label = ", ".join(x for x in (order, quant) if x)
        style = {"color": COLOURS[order], "linestyle": LINES[quant], "marker": "o", "markersize": 4, "label": label}
        axes.plot(*zip(*sorted(points), strict=True), **style)
    axes.set(xlabel="density of the maps (kept / all blocks)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=Path, default=ROOT / "assets/results/reordering.csv")
    parser.add_argument("--videos", type=Path, default=ROOT / "assets/results/method_comparison.parquet")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/figures/reordering.png")
    args = parser.parse_args(argv)
    try:
        calls = read_rows(args.errors, ("frames", "method", "quant", "density", "error"))
        videos = read_table(
            args.videos, ("setting", "method", "quant", "frames", "height", "width", "video_density", "psnr_db")
        )
    except ValueError as error:
        parser.error(str(error))
    longest = max((r["frames"] for r in calls), key=int)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    panel(left, errors([r for r in calls if r["frames"] == longest]))
    left.set(ylabel="relative L2 error of attention", yscale="log")
    for formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        formatter("{x:g}")
    left.set_title(f"{longest} frames, every call of the watched steps", fontsize=10)
    panel(right, fidelities(videos))
    right.set(ylabel="PSNR against dense, dB")
    right.set_title(f"{COMPARED_AT[0]} frames, whole videos", fontsize=10)
    finish(figure, (left, right), args.output, columns=5)
    return 0


if __name__ == "__main__":
    run_program(main)
