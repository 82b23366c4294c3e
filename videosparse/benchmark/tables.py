"""What the tables of the pages have in common: rows of files go in, a head and lines of cells come out.

A maker of a table takes the rows of one file or more, as `csv.DictReader` reads them, and gives a `Table`. A file that
is not there is no rows, and a table without lines was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from videosparse.metrics.bootstrap import interval

Row = dict[str, str]
Table = tuple[list[str], list[list[str]]]
"""The head, and the cells of every line."""

UNMEASURED = "Not measured yet."

COMPARED_AT = ("81", "128", "128")
"""Frames, height and width at which `eval/compare_methods.py` was run with every setting; other sizes have fewer."""


def markdown(table: Table) -> str:
    """A table in Markdown; says so where it has no lines."""
    head, lines = table
    if not lines:
        return UNMEASURED
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def split(table: Table) -> str:
    """A table for each value of the first column, in Markdown, below that value instead of beside it.

    Columns that a value leaves empty are left out of its table.
    """
    head, lines = table
    parts = []
    for value in dict.fromkeys(line[0] for line in lines):
        own = [line for line in lines if line[0] == value]
        used = [column for column in range(1, len(head)) if any(line[column] for line in own)]
        cells = [[line[column] for column in used] for line in own]
        parts.append(f"**{value}**\n\n{markdown(([head[column] for column in used], cells))}")
    return "\n\n".join(parts)


def usual(rows: Sequence[Row]) -> list[Row]:
    """The rows of `eval/compare_methods.py` at the size with every setting."""
    return [row for row in rows if (row["frames"], row["height"], row["width"]) == COMPARED_AT]


def ranged(row: Row, name: str) -> str:
    """A column with the ends of its interval, which are columns of their own."""
    return f"{row[name]} ({row[name + '_low']} to {row[name + '_high']})"


def mean(values: Sequence[float], digits: int) -> str:
    """The mean of values with its 95 % bootstrap interval."""
    return "{} ({} to {})".format(*(f"{x:.{digits}f}" for x in interval(values)))
