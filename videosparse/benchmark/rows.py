"""The rows that benchmarks write: where they were measured, writing them whole, reading them again."""

from __future__ import annotations

import csv
import hashlib
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

from videosparse.files import whole

WHERE = ("run", "gpu", "driver", "torch", "triton", "cuda", "commit")
"""The columns of `environment`."""


def environment(commit: str | None = None) -> dict[str, str]:
    """Columns that say when, where and with what a row was measured.

    Args:
        commit: of the code; None asks git, and is "unknown" where there is none.
    """
    return {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": str(torch.version.cuda or ""),
        "commit": commit or _told("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD") or "unknown",
    }


def version(package: str) -> str:
    """Of an installed package; empty where there is none."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return ""


def _told(*command: str) -> str:
    """First line that a program prints; empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def write_rows(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write a CSV file whole or not at all; columns that a row lacks stay empty.

    Args:
        path: of the file, whose folder is made.
        rows: at least one, unless columns are given.
        columns: in their order; None takes those of the first row.
    """
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


class RowFile:
    """A CSV file that several processes of one machine add rows to, each whole and at once.

    A row replaces the one of the same key, so that what is measured again is not there twice.

    Args:
        path: of the file, which need not exist.
        columns: in their order; columns of the file that are not among them are lost.
        key: the columns that tell rows apart.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        from filelock import FileLock

        self.path, self.columns, self.key = path, columns, key
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"videosparse-rows-{name}.lock")

    def rows(self) -> list[dict[str, str]]:
        """All of them; none where there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        own = self.key_of(row)
        with self._lock:
            others = [other for other in self.rows() if self.key_of(other) != own]
            known = set(self.columns)
            write_rows(self.path, [*({k: v for k, v in o.items() if k in known} for o in others), row], self.columns)

    def find(self, **wanted: Any) -> dict[str, str] | None:
        """The last row whose columns are as wanted."""
        found = [r for r in self.rows() if all(r.get(name) == str(value) for name, value in wanted.items())]
        return found[-1] if found else None

    def key_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        """What tells a row apart."""
        return tuple(str(row.get(name, "")) for name in self.key)


def read_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file, at least one.

    Raises:
        ValueError: there is no such file, it lacks one of the `needed` columns, or it has no rows; one line for people.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); a program under eval/ writes such a file.") from error
    missing = [name for name in needed if name not in columns]
    if missing or not rows:
        what = f"has no column {missing[0]}" if missing else "has no rows"
        raise ValueError(f"{path} {what}; expected rows with columns {', '.join(needed)}.")
    return rows


def repeated_ms(row: Mapping[str, str]) -> float | None:
    """Milliseconds of a call that `eval/bench_attention.py --clocks` repeated in turn with the others of its set.

    None of rows without `steady_ms`, and of those of a single stretch (or of before column `stretches`): one stretch of
    a call behind one of another drifts with the card, and there is no spread to see it by.
    """
    return float(row["steady_ms"]) if row.get("steady_ms") and int(row.get("stretches") or 1) >= 2 else None
