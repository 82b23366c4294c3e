"""The model card of an exported pipeline: a page whose numbers are filled in from `training.json`.

Numbers stand between `<!-- n:key -->` and `<!-- /n -->`, tables between `<!-- rounds -->` and `<!-- /rounds -->`, and
between `<!-- measured -->` and `<!-- /measured -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videosparse.benchmark.rows import read_rows
from videosparse.files import write_text

CARD = Path("assets/tiny-wan/README.md")
QUESTIONS = ("colour", "shape", "motion", "count", "background")
NEEDED = (
    *(f"{question}_right" for question in QUESTIONS), "count_expected", "permanence", "method", "settings", "frames",
    "steps", "guidance",
)  # fmt: skip
"""Columns of the rows that accuracy is taken from."""


def read_card(out: Path) -> str:
    """The card in `out`, else the one of the repository, else nothing."""
    path = next((path for path in (out / "README.md", CARD) if path.exists()), None)
    return path.read_text() if path else ""


def write_numbers(out: Path, numbers: dict[str, Any], card: str) -> None:
    """Write `training.json`, and the card with its numbers."""
    filled = fill_card(card, numbers)
    write_text(out / "training.json", json.dumps(numbers, indent=2) + "\n")
    if card:
        write_text(out / "README.md", filled)


def update_card(out: Path, rows: Sequence[Path] = ()) -> None:
    """Fill the card in `out` from its `training.json`, after adding the accuracy in `rows`, if given.

    The first are those that the card's text speaks of; all of them become lines of its table.
    """
    numbers = read_numbers(out / "training.json")
    if rows:
        numbers["accuracy"] = accuracy(rows[0])
        numbers["measured"] = [measured(path) for path in rows]
    write_numbers(out, numbers, read_card(out))


def read_numbers(path: Path) -> dict[str, Any]:
    """What `write_numbers` wrote.

    Raises:
        ValueError: there is no such file, or it holds something else; one line for people.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); --out must be a folder that `export` wrote.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object (got {type(found).__name__}); `export` writes it.")
    return found


def accuracy(path: Path) -> dict[str, Any]:
    """Share of right videos with its 95 % bootstrap interval, for each question, from rows of `eval/score_world.py`."""
    rows = read_rows(path, NEEDED)
    result: dict[str, Any] = {"rows": path.name, "videos": len(rows)}
    for question in QUESTIONS:
        values = np.array([float(row[f"{question}_right"]) for row in rows])
        means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
        low, high = (round(float(x), 4) for x in np.percentile(means, [2.5, 97.5]))
        result[question] = {
            "right": int(values.sum()),
            "share": round(float(values.mean()), 4),
            "low": low,
            "high": high,
        }
    return result


def measured(path: Path) -> dict[str, Any]:
    """What rows of `eval/score_world.py` show in all: how they were made, and the share that is right, in percent.

    `binding` is of prompts with two objects: both have the colour and the shape that the text gives each of them.
    """
    rows = read_rows(path, NEEDED)
    pairs = [row for row in rows if row["count_expected"] == "2"]
    shares = {question: [float(row[f"{question}_right"]) for row in rows] for question in QUESTIONS[:3]}
    shares["binding"] = [float(row["colour_right"] == row["shape_right"] == "1") for row in pairs]
    shares["motion of two"] = [float(row["motion_right"]) for row in pairs]
    shares["permanence"] = [float(row["permanence"]) for row in rows]
    how = {name: rows[0][name] for name in ("method", "settings", "frames", "steps", "guidance")}
    return (
        {"rows": path.name, "videos": len(rows)}
        | how
        | {name: round(100 * float(np.mean(values)), 1) if values else None for name, values in shares.items()}
    )


def measured_table(entries: list[dict[str, Any]]) -> str:
    """One row for each file of rows."""
    if not entries:
        return "Not measured yet."
    names = ("colour", "shape", "motion", "motion of two", "binding", "permanence")
    lines = [
        "| rows | videos | frames | steps | guidance | " + " | ".join(names) + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    for entry in entries:
        how = [str(entry[name]) for name in ("rows", "videos", "frames", "steps", "guidance")]
        if entry["method"].startswith("truth"):
            how[3:] = ["-", "-"]
        shares = ["-" if entry[name] is None else f"{entry[name]} %" for name in names]
        lines.append(f"| {' | '.join([*how, *shares])} |")
    return "\n".join(lines)


def fill_card(text: str, numbers: dict[str, Any]) -> str:
    """Replace what stands between the marks by the measured numbers; `not measured` where there is none."""

    def value(match: re.Match[str]) -> str:
        found: Any = numbers
        for key in match[1].split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return f"<!-- n:{match[1]} -->{'not measured' if found is None else shown(found)}<!-- /n -->"

    def rounds(match: re.Match[str]) -> str:
        return f"<!-- rounds -->\n{rounds_table(numbers.get('rounds', []))}\n<!-- /rounds -->"

    def table(match: re.Match[str]) -> str:
        return f"<!-- measured -->\n{measured_table(numbers.get('measured', []))}\n<!-- /measured -->"

    text = re.sub(r"<!-- measured -->.*?<!-- /measured -->", table, text, flags=re.S)
    text = re.sub(r"<!-- rounds -->.*?<!-- /rounds -->", rounds, text, flags=re.S)
    return re.sub(r"<!-- n:([\w.]+) -->.*?<!-- /n -->", value, text, flags=re.S)


def shown(number: Any) -> str:
    """A number as the card has it; a share in percent with its interval."""
    if isinstance(number, dict):
        share, low, high = (f"{100 * number[key]:.1f}" for key in ("share", "low", "high"))
        return f"{share} % ({low} to {high}; {number['right']} right)"
    return f"{number:,}" if isinstance(number, int) else str(number)


def rounds_table(rounds: list[dict[str, Any]]) -> str:
    """One row a round of training."""
    lines = ["| round | what | minutes | device |", "|---|---|---|---|"]
    for number, entry in enumerate(rounds, 1):
        lines.append(f"| {number} | {entry['what']} | {entry['minutes']:.2f} | {entry['device']} |")
    return "\n".join(lines)
