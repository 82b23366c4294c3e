"""Reading the rows that benchmarks write."""

from __future__ import annotations

import csv
from pathlib import Path


def read_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file, at least one.

    Raises:
        ValueError: there is no such file, it lacks one of the `needed` columns, or it has no rows; one line for people.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); eval/bench_attention.py writes such a file.") from error
    missing = [name for name in needed if name not in columns]
    if missing or not rows:
        what = f"has no column {missing[0]}" if missing else "has no rows"
        raise ValueError(f"{path} {what}; expected rows of eval/bench_attention.py.")
    return rows
