"""What a run has found out so far, a line each, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FORMAT = "videosparse-scores-1"


class Ledger:
    """A file of JSON lines that is only ever appended to.

    A line holds what was scored, a stamp of the files that went in, and the value; a changed file is scored again. The
    first line says with which settings: another run's lines are refused. A last line that a kill cut short is dropped.

    Args:
        path: of the file, made with its folder when there is something to keep.
        settings: what all lines have in common, plain values.

    Raises:
        ValueError: the file is no ledger, or is of other settings; one line for people.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._known: dict[tuple[str, str], tuple[str, str, Any]] = {}
        header = {"format": _FORMAT, "settings": dict(settings)}
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole:
            self._read(whole, header)
        if len(whole) < len(raw):  # or the next line would be glued to the torn one
            os.truncate(path, len(whole))
        self._first = None if whole else header

    def get(self, video: str, what: str, stamp: str, weights: str = "") -> Any:
        """The value of a score that is known for these very files, else None.

        Where `weights`, a stamp of the files of a learned model, is not empty, it must be of those, too.
        """
        found, of, value = self._known.get((video, what), ("", "", None))
        return value if found == stamp and weights in ("", of) else None

    def put(self, video: str, what: str, stamp: str, value: Any, weights: str = "") -> None:
        """Keep a score, on disk before this returns.

        Raises:
            OSError: it cannot be written.
        """
        if self._first is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._first)
            self._first = None
        line = {"video": video, "what": what, "stamp": stamp, "value": value}
        self._append(line | ({"weights": weights} if weights else {}))
        self._known[video, what] = stamp, weights, value

    def _read(self, whole: bytes, header: Mapping[str, Any]) -> None:
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            found = lines[0]
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']!r}")
            for line in lines[1:]:
                self._known[line["video"], line["what"]] = line["stamp"], line.get("weights", ""), line["value"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.path} holds no scores ({error}); delete it, or use another --output.") from error
        for name, value in header["settings"].items():
            before = found["settings"].get(name)
            if before != value:
                raise ValueError(
                    f"{self.path} is of a run with another {name} ({before!r} there, {value!r} now); delete it, or use "
                    "another --output."
                )

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def stamp_of(*paths: Path) -> str:
    """Changes when one of the files does: sizes and times of writing.

    A file that is not there, such as what a dangling link points to, is "absent"; reading it says why.
    """
    return " ".join(_stamp(path) for path in paths)


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    return f"{stat.st_size}-{stat.st_mtime_ns}"
