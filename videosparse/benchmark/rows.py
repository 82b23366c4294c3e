"""The rows that benchmarks write: where they were measured, writing them whole, reading them again."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


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
        raise ValueError(f"{path} cannot be read ({error}); a program under eval/ writes such a file.") from error
    missing = [name for name in needed if name not in columns]
    if missing or not rows:
        what = f"has no column {missing[0]}" if missing else "has no rows"
        raise ValueError(f"{path} {what}; expected rows with columns {', '.join(needed)}.")
    return rows
