"""Ctrl-C while our command and programs import their libraries, which takes seconds: one line, and exit code 130.

Kept apart, with nothing but the standard library, because it is in force before anything else is imported.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType

PROGRAMS = ("eval", "lora", "pipelines")


def end_at_once() -> None:
    """Let Ctrl-C end this process at once, if it runs our command or a program beside this package; else do nothing.

    Some libraries swallow a KeyboardInterrupt while they are imported, and nothing needs to be cleaned up then.
    """
    if _runs_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def hear() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again: the program has begun."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted; nothing was written.\n")
    os._exit(130)  # `program.INTERRUPTED`


def _runs_ours() -> bool:
    """Whether this process runs our command, by its script or as `python -m videosparse`, or a program beside it."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        return any(re.fullmatch(r"(-[A-Za-z]*m)?videosparse", given) for given in sys.orig_argv[1:])
    if not sys.argv or not sys.argv[0] or "--multiprocessing-fork" in sys.orig_argv:
        return False
    script, clone = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    return script.stem == "videosparse" or (script.parent.parent == clone and script.parent.name in PROGRAMS)
