"""Write the tables of the pages (README.md, those of the folders, the model card) from the rows in `assets/results`.

    python eval/readme_tables.py            rewrite what stands between the marks
    python eval/readme_tables.py --check    exit with 1 if a table is out of date (the test suite does this)

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. `TABLES` says from which files each is made, and by
what: makers are in `videosparse/benchmark/*_tables.py` and `videosparse/evaluation/method_table.py`, and take the rows
of the files in their order.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from videosparse.benchmark import (
    card_tables,
    declared_tables,
    kernel_tables,
    paro_tables,
    quality_tables,
    step_tables,
    training_tables,
)
from videosparse.benchmark.tables import UNMEASURED, Row, Table, markdown, split
from videosparse.evaluation import method_table
from videosparse.evaluation.table import read_table
from videosparse.files import write_text
from videosparse.generation.stack import together

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "assets/results"
PAGES = (
    "README.md", "pipelines/README.md", "assets/tiny-wan/README.md",
    "assets/results/adaspa.md", "assets/results/integers.md", "assets/results/kernels.md", "assets/results/lengths.md",
    "assets/results/methods.md", "assets/results/models.md", "assets/results/paro.md", "assets/results/profile.md",
    "assets/results/radial.md", "assets/results/training.md", "assets/results/vbench.md",
)  # fmt: skip

Maker = Callable[..., Table | str]


def read(name: str) -> list[Row]:
    """The rows of a file, CSV or Parquet; none where there is no file."""
    paths = (RESULTS / f"{name}{suffix}" for suffix in (".csv", ".parquet"))
    return next((read_table(path) for path in paths if path.exists()), [])


def apart(maker: Callable[..., Table]) -> Maker:
    """A maker of a table for each value of the first column."""
    return lambda *rows: split(maker(*rows))


def picture(name: str, shows: str) -> Maker:
    """A maker of a picture, which is nothing where it was not drawn."""
    return lambda *_: f"![{shows}](../figures/{name})" if (RESULTS.parent / "figures" / name).exists() else ""


# a table: its files, and the makers of what stands there, one below the other
TABLES: dict[str, tuple[tuple[str, ...], *tuple[Maker, ...]]] = {
    "figure": (("figure_dense_vs_radial",), quality_tables.figure),
    "accuracy": (
        (
            "tiny_wan_ceiling_33", "tiny_wan_dense_33", "tiny_wan_radial_33", "tiny_wan_heldout_33_50",
            "tiny_wan_heldout_81_50",
        ),
        quality_tables.accuracy,
    ),
    "densities": (("radial_density",), quality_tables.densities),
    "coverage": (("radial_coverage",), apart(quality_tables.coverage)),
    "recall": (("attention_recall",), quality_tables.recall),
    "fidelity": (("method_comparison",), method_table.fidelity),
    "methods": (
        ("method_comparison",), method_table.side_by_side, method_table.missing_sizes, method_table.earlier_weights,
        picture("methods.png", "PSNR and right videos by density, PSNR by length"), method_table.methods,
    ),
    "gains": (("method_comparison",), method_table.gains),
    "rounding": (("reordering",), quality_tables.rounding),
    "integer_errors": (("integer_errors",), quality_tables.integer_errors),
    "attention": (("attention",), kernel_tables.rates),
    "backward": (("attention",), kernel_tables.backward),
    "radial_speed": (("attention",), kernel_tables.radial_speed),
    "goals": (("attention_goals",), kernel_tables.goals),
    "norms": (("norm_rotate",), kernel_tables.norms),
    "cpu": (("cpu_attention",), kernel_tables.cpu),
    "far": (("far_scores",), kernel_tables.far),
    "search": (("search_cost",), kernel_tables.search),
    "integers": (("attention",), kernel_tables.integers),
    "published": (("method_comparison", "attention"), paro_tables.published),
    "paro_videos": (("method_comparison",), method_table.paro_videos),
    "reordering": (
        ("reordering",), apart(paro_tables.reordering),
        picture("reordering.png", "Error of attention and PSNR of videos"),
    ),
    "reorder_cost": (("reorder",), paro_tables.reorder_cost),
    "calibration": (("paro_calibration",), paro_tables.calibration),
    "models": (("models",), step_tables.overview, step_tables.missing),
    "model_steps": (("models",), apart(step_tables.every_row), step_tables.missing),
    "model_check": (("models",), step_tables.extrapolation),
    "model_goals": (("model_goals",), apart(step_tables.goals)),
    "profile": (("profile",), step_tables.profile, picture("profile.png", "Milliseconds of a layer by part")),
    "several_gpus": (("multi_gpu",), step_tables.shared),
    "training": (("lora_training",), training_tables.steps),
    "lora_lengths": (
        ("lora_length",), apart(training_tables.lengths), training_tables.missing_lengths,
        picture("lora_lengths.png", "Right answers by quarter, drift and repetition"),
    ),
    "dimensions": ((), declared_tables.dimensions),
    "speeds": ((), declared_tables.speeds),
    "cards": (("models",), card_tables.cards),
    "stack": ((), together),
}  # fmt: skip


def made(name: str) -> str:
    """A table in Markdown, with what stands below it; says so where nothing was measured.

    Raises:
        ValueError: rows that cannot be read, or of which no such table can be made; one line for people.
    """
    files, *makers = TABLES[name]
    rows = [read(file) for file in files]
    try:
        pieces = [maker(*rows) for maker in makers]
    except KeyError as error:
        raise ValueError(f"Table {name}: {' or '.join(files)} in {RESULTS} has no column or row {error}.") from error
    texts = [piece if isinstance(piece, str) else markdown(piece) for piece in pieces]
    return UNMEASURED if texts[0] in ("", UNMEASURED) else "\n\n".join(filter(None, texts))


def fill(text: str) -> str:
    """The page with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"Unknown table {match[1]!r}; there are {', '.join(TABLES)}.")
        return f"<!-- table:{match[1]} -->\n{made(match[1])}\n<!-- /table -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- /table -->", table, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        page = ROOT / name
        old = page.read_text()
        new = fill(old)
        if new != old:
            stale.append(name)
            if not args.check:
                write_text(page, new)
    if args.check and stale:
        print(f"Out of date: {', '.join(stale)}; run python eval/readme_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main, (ValueError, OSError))  # rows, files
