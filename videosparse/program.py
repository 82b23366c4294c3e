"""How programs end: `run_program`. Ctrl-C and what they refuse are one line; SIGTERM runs their clean-up code.

`quiet_loading` and `leave_out` leave what libraries say to themselves.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NoReturn

from videosparse import interrupts

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 and the number of SIGINT. That of SIGTERM is 143."""


def run_program(
    main: Callable[[], int | None],
    refusing: tuple[type[Exception], ...] = (),
    interrupted: str = "Interrupted.",
) -> None:
    """Run a program, and leave with its exit code; returns where that is 0.

    Args:
        main: the program, which returns its exit code; None is 0.
        refusing: errors that tell what was wrong with the request: one line, and exit code 2. Others come through.
        interrupted: what Ctrl-C says; its exit code is 130.

    Raises:
        SystemExit: another exit code than 0.
    """
    interrupts.hear()
    with leaving_on_sigterm():
        try:
            code = main()
        except KeyboardInterrupt:
            sys.stderr.write(f"{interrupted}\n")
            raise SystemExit(INTERRUPTED) from None
        except refusing as error:
            from videosparse.generation.errors import told

            sys.stderr.write(f"Error: {told(error)}\n")
            raise SystemExit(2) from None
    if code:
        raise SystemExit(code)


def quiet_loading() -> None:
    """Hush what Diffusers and Transformers say while they load, in this process: their bars tear a program's lines."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # their deprecations are for us
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what is an error also comes as an exception
        library.utils.logging.disable_progress_bar()


def leave_out(remark: str, logger: str) -> None:
    """Leave out what a library's logger says with `remark` in it, in this process; again changes nothing."""
    logging.getLogger(logger).addFilter(_without(remark))


@cache
def _without(remark: str) -> Callable[[logging.LogRecord], bool]:
    """One filter for each remark: a logger takes the same one once."""
    return lambda record: remark not in record.getMessage()


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Let SIGTERM leave a block through its clean-up code, as Ctrl-C does, with exit code 143.

    Without it the process is gone at once, and the parts of files that it was writing stay behind. One of several ranks
    keeps that: it may be waiting in a collective call for one that has ended, where Python hears no signal.
    """
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
