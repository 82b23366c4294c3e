"""The rows of a page: of several tables, every cell and every video of which means one thing; `gather`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from videosparse.evaluation.judging import DIMENSIONS, FIDELITY, WORLD
from videosparse.evaluation.kinds import Kinds
from videosparse.evaluation.page.summary import NEEDED
from videosparse.evaluation.table import Row, read_table
from videosparse.evaluation.work import COLUMNS, FIXED, KEY, SHARED, TIMED

NUMBERS = (
    "asked_density", "video_density", "average_density", "seconds", "denoise_seconds", *FIDELITY, *WORLD, *DIMENSIONS,
)  # fmt: skip
"""Columns of numbers, which may be empty."""

_COUNTS = ("frames", "height", "width")
_KEPT = ("video", "map", "map_shows")
_COMPARED = tuple(name for name in COLUMNS if name not in TIMED)


def gather(paths: Sequence[Path]) -> list[Row]:
    """The rows of several tables, of each video one: the first, with the kept video and map that a later one names.

    Raises:
        ValueError: a table cannot be read, a cell is no number where one belongs, two rows of one video differ, or the
            tables are of different weights, dtypes or conventions; one line for people.
    """
    kinds, found, places = Kinds(FIXED, SHARED), dict[tuple[str, ...], Row](), dict[tuple[str, ...], str]()
    for path in paths:
        for number, row in enumerate(read_table(path, NEEDED), start=1):
            place = f"{path}, row {number}"
            _check_cells(row, place)
            kinds.add(row, str(path), "a page shows rows of one kind, so make one of each.")
            key = tuple(row.get(name, "") for name in KEY)
            if key in found:
                found[key] = _one(found[key], row, f"{places[key]} and {place}")
            else:
                found[key], places[key] = row, place
    return list(found.values())


def _one(first: Row, again: Row, places: str) -> Row:
    """What two rows of one video say."""
    for name in _COMPARED:
        if first.get(name, "") != again.get(name, ""):
            raise ValueError(
                f"{places} are of one video ({first['setting']}, seed {first['seed']}), but say {name} "
                f"{first.get(name, '')!r} and {again.get(name, '')!r}; give tables of one comparison."
            )
    return first | {name: again[name] for name in _KEPT if not first.get(name) and again.get(name)}


def _check_cells(row: Row, place: str) -> None:
    """Raise ValueError where a cell cannot be shown; "inf" is the PSNR of equal frames."""
    for name in _COUNTS:
        _check(row[name].isdecimal(), row, name, place, "a whole number")
    if row.get("tokens"):
        _check(row["tokens"].isdecimal(), row, "tokens", place, "a whole number or empty")
    for name in NUMBERS:
        if text := row.get(name, ""):
            is_good = _is_number(text) or ("psnr" in name and text == "inf")
            _check(is_good, row, name, place, "a number or empty")
    for pair in row.get("drift", "").split():
        seconds, colon, cosine = pair.partition(":")
        _check(bool(colon) and _is_number(seconds) and _is_number(cosine), row, "drift", place, "seconds:cosine pairs")


def _check(is_good: bool, row: Row, name: str, place: str, expected: str) -> None:
    if not is_good:
        raise ValueError(
            f"{place}, column {name} must hold {expected} (got {row[name]!r}); mend the table, or make the row again "
            "with eval/compare_methods.py."
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
