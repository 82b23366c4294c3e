"""Draw the rows of `eval/compare_methods.py`: likeness to dense and truth to the prompt, by density and by length.

    python eval/plot_methods.py

Writes `assets/figures/methods.png`. Left: PSNR against dense by density, at 81 frames of 128x128. Middle: videos that
show all that the prompt says, beside those of dense attention and of the truth through the VAE. Right: PSNR at Radial's
density, longer and longer videos. Bars are 95 % intervals over prompts. Needs matplotlib
(`pip install -e ".[eval]"`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from videosparse.program import run_program

from matplotlib import pyplot as plt

from videosparse.benchmark.figures import finish
from videosparse.benchmark.tables import Row, usual
from videosparse.evaluation.page.summary import Group, sizes_of
from videosparse.evaluation.table import read_table
from videosparse.generation.output import check_place
from videosparse.metrics.bootstrap import Interval

ROOT = Path(__file__).resolve().parents[1]
# one colour a method in every panel, readable without colour vision
STYLES = {
    "radial": ("#D55E00", "s", "-"), "adaspa": ("#0072B2", "o", "-"), "paro": ("#009E73", "^", "-"),
    "paro-mass": ("#009E73", "D", "--"), "paro-raster": ("#009E73", "^", ":"), "paro-online": ("#56B4E9", "v", "-"),
    "random": ("#999999", "x", ":"),
}  # fmt: skip
LABELS = {
    "radial": "Radial", "adaspa": "AdaSpa", "paro": "PARO, plan", "paro-mass": "PARO, plan with orders by mass",
    "paro-raster": "PARO, plan without token orders",
    "paro-online": "PARO, in the run", "random": "random blocks",
}  # fmt: skip
NEEDED = ("setting", "method", "quant", "frames", "height", "width", "video_density", "psnr_db", "all_right")

Points = list[tuple[float, Interval]]


def plain(groups: Sequence[Group]) -> list[Group]:
    """Settings in full precision and without options of their own."""
    return [group for group in groups if group.method in STYLES and not group.quant and "=" not in group.setting]


def by_density(groups: Sequence[Group], name: str, factor: float) -> dict[str, Points]:
    """(density, mean of a column) of every method."""
    found: dict[str, Points] = {}
    for group in plain(groups):
        mean, density = group.mean(name), group.mean("video_density")
        if mean is not None and density is not None:
            found.setdefault(group.method, []).append((density.mean, scaled(mean, factor)))
    return found


def by_length(rows: Sequence[Row]) -> tuple[list[str], dict[str, Points]]:
    """Names of the sizes, and (place, PSNR) of what runs at Radial's density there."""
    sizes, found = sizes_of(rows), dict[str, Points]()
    for place, size in enumerate(sizes):
        for group in plain(size.groups):
            mean = group.mean("psnr_db")
            if mean is not None and (group.method == "radial" or group.setting.endswith("density of radial")):
                found.setdefault(group.method, []).append((place, mean))
    names = [f"{size.key['frames']} of\n{size.key['height']}x{size.key['width']}" for size in sizes]
    return names, found


def scaled(mean: Interval, factor: float) -> Interval:
    return Interval(*(value * factor for value in mean))


def panel(axes: plt.Axes, lines: dict[str, Points], apart: float = 0) -> None:
    """A line with intervals for every method, `apart` beside that of the one before, so that all can be seen."""
    for number, (method, (colour, marker, line)) in enumerate(STYLES.items()):
        points = sorted((x + apart * (number - len(STYLES) / 2), mean) for x, mean in lines.get(method, ()))
        if points:
            means = [mean for _, mean in points]
            sides = [m.mean - m.low for m in means], [m.high - m.mean for m in means]
            axes.errorbar(
                [x for x, _ in points], [m.mean for m in means], yerr=sides, color=colour, marker=marker,
                linestyle=line, markersize=4, capsize=2, linewidth=1.2, label=LABELS[method],
            )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def level(axes: plt.Axes, groups: Sequence[Group], method: str, name: str, factor: float, label: str) -> None:
    """A line across for an anchor."""
    mean = next((group.mean(name) for group in groups if group.method == method and not group.quant), None)
    if mean is not None:
        axes.axhline(mean.mean * factor, color="black", linewidth=0.8, linestyle="--" if method == "ceiling" else "-")
        place = (1.01, mean.mean * factor)
        axes.annotate(label, place, xycoords=("axes fraction", "data"), fontsize=8, va="center", annotation_clip=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "assets/results/method_comparison.parquet")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/figures/methods.png")
    args = parser.parse_args(argv)
    check_place(args.output)
    rows = read_table(args.rows, NEEDED)
    if not rows:
        raise ValueError(f"{args.rows} has no rows; run eval/compare_methods.py.")
    groups = [group for size in sizes_of(usual(rows)) for group in size.groups]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.2, 4.4), layout="constrained")
    panel(left, by_density(groups, "psnr_db", 1))
    level(left, groups, "other-noise", "psnr_db", 1, "dense,\nother\nnoise")
    left.set(xlabel="density of the maps (kept / all blocks)", ylabel="PSNR against dense, dB")
    left.set_title("81 frames of 128x128", fontsize=10)
    panel(middle, by_density(groups, "all_right", 100), 0.004)
    for method, label in (("dense", "dense"), ("ceiling", "truth\nthrough\nthe VAE")):
        level(middle, groups, method, "all_right", 100, label)
    middle.set(xlabel="density of the maps (kept / all blocks)", ylabel="videos with all right, %", ylim=(0, 103))
    middle.set_title("81 frames of 128x128", fontsize=10)
    names, lines = by_length(rows)
    panel(right, lines, 0.05)
    right.set(ylabel="PSNR against dense, dB", xlabel="frames and pixels", xlim=(-0.4, len(names) - 0.6))
    right.set_xticks(range(len(names)), names)
    right.set_title("at Radial's density", fontsize=10)
    finish(figure, (left, middle, right), args.output, columns=6)
    return 0


if __name__ == "__main__":
    run_program(main, (ValueError, OSError))  # rows, files
