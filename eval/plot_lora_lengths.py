"""Draw the rows of `eval/score_lora_lengths.py`: videos beyond the trained length, with and without LoRAs.

    python eval/plot_lora_lengths.py

Writes `assets/figures/lora_lengths.png`. Above, a panel for each length: what the prompt names that came out right in
each quarter of the video, with 95 % intervals. Below: drift (right in the first quarter, wrong in the last), repetition
beyond the true video's, and what training took. A setting without a row has no mark. Needs matplotlib
(`pip install -e ".[eval]"`).
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
from videosparse.benchmark.training_tables import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
QUARTERS = (1, 2, 3, 4)
NEEDED = ("lora", "method", "frames", "right_q1", "right_q4_high", "drift", "repetition", "training_s",
          "training_peak_gib", "training_steps")  # fmt: skip
# one colour a setting in every panel, readable without colour vision
LINES = (("black", ":"), ("#999999", "--"), ("#CC79A7", "--"), ("#E69F00", "-."), ("#009E73", "-."), ("#56B4E9", "-."),
         ("#0072B2", "-"), ("#D55E00", "-"))  # fmt: skip
STYLES = {key: (label, *line) for (key, label), line in zip(SETTINGS.items(), LINES, strict=True)}

Row = dict[str, str]


def quarters_panel(axes: plt.Axes, rows: list[Row], frames: str) -> None:
    """Share of right answers against the quarter."""
    for at, (key, (label, colour, line)) in enumerate(STYLES.items()):
        for row in rows:
            if (row["lora"], row["method"], row["frames"]) == (*key, frames):
                marks(axes, row, [f"right_q{q}" for q in QUARTERS], [q + 0.03 * (at - 3.5) for q in QUARTERS],
                      colour, line, label)  # fmt: skip
    axes.set(xlabel="quarter of the video", ylim=(0, 103), xticks=QUARTERS, title=f"{frames} frames")
    axes.set_ylabel("right answers, %")


def length_panel(axes: plt.Axes, rows: list[Row], name: str, scale: float, label: str) -> None:
    """One figure against the length."""
    for at, (key, (_, colour, line)) in enumerate(STYLES.items()):
        mine = sorted((r for r in rows if (r["lora"], r["method"]) == key), key=lambda r: int(r["frames"]))
        lengths = sorted({int(r["frames"]) for r in rows})
        for row in mine:
            marks(axes, row, [name], [lengths.index(int(row["frames"])) + 0.045 * (at - 3.5)], colour, line, "", scale)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="frames", ylabel=label)


def marks(axes: plt.Axes, row: Row, names: list[str], places: list[float], colour: str, line: str, label: str,
          scale: float = 100) -> None:  # fmt: skip
    """Means with their intervals."""
    middle, low, high = ([scale * float(row[name + end]) for name in names] for end in ("", "_low", "_high"))
    below = [max(0.0, m - x) for m, x in zip(middle, low, strict=True)]
    above = [max(0.0, x - m) for m, x in zip(middle, high, strict=True)]
    axes.errorbar(places, middle, [below, above], color=colour, linestyle=line, marker="o", markersize=4, capsize=2,
                  label=label or None)  # fmt: skip


def training_panel(axes: plt.Axes, rows: list[Row]) -> None:
    """Seconds and memory of the trained settings."""
    found = {(r["lora"], r["method"]): r for r in rows if r["training_s"]}
    names = []
    for key, (label, colour, _) in STYLES.items():
        if key in found:
            row = found[key]
            bar = axes.barh(len(names), float(row["training_s"]), color=colour, height=0.5)
            told = f"{row['training_steps']} steps, {float(row['training_peak_gib']):.1f} GiB"
            axes.bar_label(bar, [told], label_type="center", color="white", fontsize=9)
            names.append(label)
    axes.set_yticks(range(len(names)), names, rotation=90, va="center", fontsize=8)
    axes.set(xlabel="training, s", ylim=(-0.6, max(1, len(names)) - 0.4))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "assets/results/lora_length.csv")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/figures/lora_lengths.png")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.rows, NEEDED)
    except ValueError as error:
        parser.error(str(error))
    lengths = sorted({row["frames"] for row in rows}, key=int)
    columns = max(3, len(lengths))
    figure, panels = plt.subplots(2, columns, figsize=(4.2 * columns, 7.4), layout="constrained", squeeze=False)
    for axes, frames in zip(panels[0], lengths, strict=False):
        quarters_panel(axes, rows, frames)
    length_panel(panels[1][0], rows, "drift", 100, "drift, points")
    length_panel(panels[1][1], rows, "repetition", 1, "repetition beyond the truth's")
    training_panel(panels[1][2], rows)
    for axes in (*panels[0][len(lengths) :], *panels[1][3:]):
        axes.set_visible(False)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    finish(figure, panels[0], args.output, columns=3)
    return 0


if __name__ == "__main__":
    run_program(main)
