"""What the commands share: how errors end a command, progress bars, and how numbers are written."""

from __future__ import annotations

from videosparse.program import quiet_loading

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Debug = Annotated[
    bool, typer.Option("--debug", envvar="VIDEOSPARSE_DEBUG", help="Show the traceback of an error, and library logs.")
]

_LABEL = 14  # the longest is "transformers"

_PHASES = {
    "load": "loading",
    "prompt": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "maps": "finding maps",
}


@contextmanager
def guard(
    debug: bool, interrupted: str = "Interrupted; nothing was written.", options: Iterable[str] = ()
) -> Iterator[None]:
    """End a command on an error with one line on stderr and the right exit code.

    2 when the request cannot be carried out, 1 for anything unexpected, 130 after Ctrl-C. With `debug` the traceback
    comes through instead. `interrupted` is what Ctrl-C says. Messages name options where the library names fields;
    `options` are those of this command alone.
    """
    try:
        from videosparse.generation.errors import GenerationError, one_line, renamed, told

        if not debug:
            _quiet_libraries()
    except KeyboardInterrupt:  # libraries take seconds to import
        _fail(interrupted, 130)
    try:
        yield
    except KeyboardInterrupt:
        _fail(interrupted, 130)
    except GenerationError as error:
        if debug:
            raise
        _fail(f"Error: {renamed(told(error), {name: _option(name) for name in options})}", 2)
    except (typer.Exit, SystemExit, BrokenPipeError):  # who reads our output may leave early: `plan | head`
        raise
    except Exception as error:
        if debug:
            raise
        _fail(f"Unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)", 1)


def _option(name: str) -> str:
    """What a field is called on the command line."""
    return f"--{name.replace('_', '-')}"


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _quiet_libraries() -> None:
    """Hush what libraries say on import and loading; our bars say what happens."""
    warnings.filterwarnings("ignore")
    quiet_loading()
    logging.getLogger("torch").setLevel(logging.ERROR)


class Bars:
    """Progress bars on stderr, one for each phase; call it as a `videosparse.generation` progress function."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a phase are finished."""
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(
                _label(phase), total=None if total == 1 and not done else total
            )
        self._progress.update(self._tasks[phase], completed=done, total=total if total > 1 or done else None)


class Lines:
    """Progress for a log on stderr: a line for each phase, and for each tenth of its steps; call it as `Bars`."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._tenths: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Tell that `done` of `total` parts of a phase are finished, where that is worth a line."""
        tenth = 0 if total == 1 else done * 10 // total
        if self._tenths.get(phase) == tenth:
            return
        self._tenths[phase] = tenth
        count = "" if total == 1 else f" {done}/{total}"
        passed = timedelta(seconds=int(time.monotonic() - self._start))
        typer.echo(f"[{passed}] {_label(phase)}{count}", err=True)


def _label(phase: str) -> str:
    """What users call a phase; a run's name may stand before it."""
    *run, kind = phase.split(" ")
    return " ".join([*run, _PHASES.get(kind, kind)])


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress for the time of a block: bars, which are gone afterwards, errors included; lines off a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    times = TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left")
    columns = (TextColumn("{task.description:<26}"), BarColumn(20), MofNCompleteColumn(), *times)
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


def rows(pairs: list[tuple[str, str]]) -> None:
    """Print labels and values in two columns; long values are wrapped by the terminal, never cut."""
    for label, value in pairs:
        typer.echo(f"{label:<{_LABEL}}{value}")


def seconds(value: float) -> str:
    """A duration with as many digits as matter."""
    if value >= 120:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def memory(value: int | None) -> str:
    """A number of bytes in binary units."""
    if value is None:
        return "unknown"
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{amount:.2f} {unit}"


def flops(value: float) -> str:
    """A number of floating-point operations in decimal units."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e6:.2f} MFLOP"
