"""Draw the rows of `eval/measure_recall.py`: what dropping blocks costs, by density and by step.

    python eval/plot_recall.py

Writes `assets/figures/recall.png`. Left and middle: relative L2 error of attention's output against density, blocks of
64x64, over all steps after the search. Right: recall over the steps of the longest video at density 0.2, which shows
what the age of a map costs. Needs matplotlib (`pip install -e ".[eval]"`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from videosparse.program import run_program

from matplotlib import pyplot as plt

from videosparse.benchmark.figures import finish
from videosparse.benchmark.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "64x64"
DENSITY = "0.2"
# one colour a method in every panel, readable without colour vision
STYLES = {
    "random": ("#999999", ":"), "radial": ("#D55E00", "-"), "adaspa, equal heads": ("#56B4E9", "--"),
    "adaspa, one search": ("#CC79A7", "--"), "adaspa": ("#0072B2", "-"), "adaspa, search now": ("#009E73", "-."),
    "best": ("black", ":"),
}  # fmt: skip

Row = dict[str, str]


def error_panel(axes: plt.Axes, rows: list[Row], frames: str) -> None:
    """Error against density of every method."""
    chosen = [r for r in rows if r["frames"] == frames and r["block"] == BLOCK and r["step"] == "all"]
    for method, (colour, line) in STYLES.items():
        points = sorted((float(r["density"]), float(r["error"])) for r in chosen if r["method"] == method)
        if points:
            axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=colour, label=method)
    tokens = int(chosen[0]["tokens"])
    axes.set(xscale="log", yscale="log", xlabel="density (kept / all blocks)", ylabel="relative L2 error")
    axes.set_title(f"{frames} frames, {tokens:,} tokens", fontsize=10)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()


def step_panel(axes: plt.Axes, rows: list[Row], frames: str) -> None:
    """Recall over the steps of every method at one density."""
    chosen = [
        r for r in rows
        if (r["frames"], r["block"], r["asked_density"]) == (frames, BLOCK, DENSITY) and r["step"] != "all"
    ]  # fmt: skip
    for method, (colour, line) in STYLES.items():
        points = sorted((int(r["step"]), float(r["recall"])) for r in chosen if r["method"] == method)
        if points and method != "random":
            axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=colour)
    axes.set(xlabel=f"step of {chosen[0]['steps']}", ylabel="recall of attention mass")
    axes.set_title(f"{frames} frames, density {DENSITY}", fontsize=10)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "assets/results/attention_recall.csv")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/figures/recall.png")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.rows, ("frames", "method", "block", "asked_density", "step", "recall", "error"))
    except ValueError as error:
        parser.error(str(error))
    lengths = sorted({r["frames"] for r in rows}, key=int)
    figure, panels = plt.subplots(1, len(lengths) + 1, figsize=(4.4 * (len(lengths) + 1), 4.2), layout="constrained")
    for axes, frames in zip(panels, lengths, strict=False):
        error_panel(axes, rows, frames)
    step_panel(panels[-1], rows, lengths[-1])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    finish(figure, panels[:1], args.output, columns=4)
    return 0


if __name__ == "__main__":
    run_program(main)
