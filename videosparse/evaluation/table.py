"""Rows that are written as they come and survive a killed run: `RowStore`; and tables as CSV or Parquet.

While a comparison runs, each of its processes appends to a file of its own in the folder `<output>.parts`, a JSON
object a line, on disk before the next video is made. At the end all of them become one table, whole or not at all.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from videosparse.benchmark.rows import write_rows
from videosparse.evaluation.kinds import Kinds
from videosparse.files import whole
from videosparse.wording import install_extra

Row = dict[str, str]
"""Column by name; what a row lacks is ""."""

_PARQUET = ".parquet"
_EXPECTED = "expected rows of eval/compare_methods.py."
_ANOTHER = "use another --output."


def read_table(path: Path, needed: Sequence[str] = ()) -> list[Row]:
    """The rows of a CSV or Parquet file.

    Raises:
        ValueError: it cannot be read, lacks one of the `needed` columns, or pyarrow is missing; one line for people.
    """
    try:
        rows, columns = _read_parquet(path) if path.suffix == _PARQUET else _read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); eval/compare_methods.py writes such a file.") from error
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}; {_EXPECTED}")
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a CSV file, or Parquet where the name ends so, whole or not at all; columns that a row lacks stay empty.

    Raises:
        ValueError: Parquet without pyarrow.
    """
    if path.suffix == _PARQUET:
        _write_parquet(path, rows, columns)
    else:
        write_rows(path, [dict(row) for row in rows], columns)


def check_table_name(path: Path) -> None:
    """Raise ValueError unless tables of that name can be written here; before anything expensive runs."""
    if path.suffix not in (".csv", _PARQUET):
        raise ValueError(f"A table must end in .csv or .parquet (got {str(path)!r}); use {path.stem}.csv.")
    if path.suffix == _PARQUET:
        _pyarrow()


class RowStore:
    """The rows of one comparison: those of an earlier run, and new ones.

    Args:
        output: the table, .csv or .parquet.
        columns: of a row, in their order.
        key: the columns that tell videos apart: a video with the same is not made again.
        process: number of this process; each has a file of its own.
        fixed: columns in which all rows of one model must agree, such as its weights.
        shared: columns in which all rows must agree.

    Raises:
        ValueError: rows that cannot be read, or do not agree in what is fixed or shared.
    """

    def __init__(
        self,
        output: Path,
        columns: Sequence[str],
        key: Sequence[str],
        process: int = 0,
        fixed: Sequence[str] = (),
        shared: Sequence[str] = (),
    ) -> None:
        check_table_name(output)
        self.output, self.columns, self.key = output, tuple(columns), tuple(key)
        self.folder = output.with_name(output.name + ".parts")
        self.own = self.folder / f"rows-{process}.jsonl"
        self._done, self._kinds = set[tuple[str, ...]](), Kinds(fixed, shared)
        for row in self.rows():
            self._done.add(self.key_of(row))
            self._kinds.add(row, str(output), f"keep the rows of one kind in it, or {_ANOTHER}")

    def key_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What tells its video apart."""
        return tuple(str(row[name]) for name in self.key)

    def check(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError where a row, which may hold its model and fixed and shared columns alone, has no place here:
        rows of its model say something else in one of these columns. One line for people."""
        self._kinds.check(row, "this run", _ANOTHER)

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether the video of a row is here, which may hold its key, fixed and shared columns alone.

        Raises:
            ValueError: see `check`.
        """
        self.check(row)
        return self.key_of(row) in self._done

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, which are on disk when this returns."""
        listed = list(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.own)
        try:
            with self.own.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in listed)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk names no file
            error.filename = str(self.own)
            raise
        self._done |= {self.key_of(row) for row in listed}

    def take(self, paths: Iterable[Path], may_differ: Sequence[str] = ()) -> None:
        """Add the rows of other tables, as of other machines; a video that several have must be the same in all.

        Args:
            paths: of the other tables, with the same columns.
            may_differ: columns in which two rows of one video need not agree; the first one stays.

        Raises:
            ValueError: one cannot be read, lacks a column, says otherwise of a video, or has rows that do not agree
                with others in what is fixed or shared; then none is added.
        """
        kinds = self._kinds.copy()
        known = {self.key_of(row): row for row in self.rows()}
        before, compared = set(known), [name for name in self.columns if name not in may_differ]
        for path in paths:
            for row in read_table(path, self.columns):
                kinds.add(row, str(path), "merge rows of one comparison only.")
                key = self.key_of(row)
                first = known.setdefault(key, row)
                if differs := [name for name in compared if first.get(name, "") != row[name]]:
                    raise ValueError(
                        f"{path} says {differs[0]} {row[differs[0]]!r} of a video of which another table says "
                        f"{first.get(differs[0], '')!r} ({', '.join(key)}); merge rows of one comparison only."
                    )
        self.add(row for key, row in known.items() if key not in before)
        self._kinds = kinds

    def rows(self) -> list[Row]:
        """All rows so far, of all processes: one for each key, the newest."""
        found: dict[tuple[str, ...], Row] = {}
        kept = read_table(self.output, self.key) if self.output.exists() else []
        for row in (*kept, *(row for path in self._parts() for row in _read_lines(path))):
            found[self.key_of(row)] = row
        return list(found.values())

    def merge(self, order: Iterable[tuple[str, ...]]) -> list[Row]:
        """Make one table of everything and remove the parts; call it when no process writes any more.

        Args:
            order: keys in the order of the table; rows with other keys stay before them.
        """
        place = {key: number for number, key in enumerate(order)}
        parts = self._parts()
        rows = sorted(self.rows(), key=lambda row: place.get(self.key_of(row), -1))
        if rows:
            write_table(self.output, rows, self.columns)
        for path in parts:
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        return rows

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.jsonl"))


def number(row: Mapping[str, str], name: str) -> float | None:
    """A cell as a number; None where it is empty or missing.

    Raises:
        ValueError: it is something else; one line for people.
    """
    text = row.get(name, "")
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"Column {name} must hold numbers (got {text!r}); {_EXPECTED}") from None


def check_counts(rows: Iterable[Row], names: Sequence[str]) -> None:
    """Raise ValueError where a cell of these columns is no whole number; one line for people."""
    for name, text in ((name, row[name]) for row in rows for name in names):
        if not text.isdecimal():
            raise ValueError(f"Column {name} must hold whole numbers (got {text!r}); {_EXPECTED}")


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed run did not finish."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def _read_lines(path: Path) -> list[Row]:
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1].decode("utf-8")
    try:
        return [{name: _text(value) for name, value in json.loads(line).items()} for line in whole.splitlines()]
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and its videos are made again.") from error


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _read_csv(path: Path) -> tuple[list[Row], Sequence[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"line {reader.line_num} has not as many cells as the first")
            rows.append(row)
        return rows, reader.fieldnames or ()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"Parquet needs pyarrow: {install_extra('parquet')}; or use a .csv name.") from error
    return pyarrow


def _read_parquet(path: Path) -> tuple[list[Row], Sequence[str]]:
    arrow = _pyarrow()
    try:
        table = arrow.parquet.read_table(path)
    except arrow.ArrowInvalid as error:
        raise OSError(str(error).splitlines()[0]) from error
    return [{name: _text(value) for name, value in row.items()} for row in table.to_pylist()], table.column_names


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    arrow = _pyarrow()
    data = {name: _column([_text(row.get(name)) for row in rows]) for name in columns}
    with whole(path) as part:
        arrow.parquet.write_table(arrow.table(data), part, compression="zstd")


def _column(texts: list[str]) -> list[Any]:
    """Ints or floats where every cell that is not empty comes back as it was, else texts: a commit may be 12e4567."""
    for kind in (int, float):
        try:
            values = [kind(text) if text else None for text in texts]
        except ValueError:
            continue
        if all(_is_kept(value, text) for value, text in zip(values, texts, strict=True) if text):
            return values
    return texts


def _is_kept(value: int | float | None, text: str) -> bool:
    """Whether a number is written as the text that it was read from, and fits into 64 bits."""
    return str(value) == text and not (isinstance(value, int) and value.bit_length() > 63)
