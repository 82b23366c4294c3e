"""What a user can get wrong, as one kind of error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch


class GenerationError(ValueError):
    """A request that cannot be carried out; the message says what, why and what to do, in one line."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ("Did you mean 'x'?" after a space) at the known word most like `word`; empty when none is close."""
    lowered = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    return f" Did you mean {lowered[match[0]]!r}?" if match else ""


@contextmanager
def memory_errors(knobs: Callable[[], str] | None = None) -> Iterator[None]:
    """Say what to do about full memory; `knobs` names what would help on a GPU, where more is known of the run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        helps = "use --offload model, fewer frames or a smaller size" if knobs is None else knobs()
        raise GenerationError(
            f"The GPU has too little memory for this video{_used()}; {helps}. videosparse plan tells what Wan needs."
        ) from error
    except (MemoryError, RuntimeError) as error:
        # how torch reports that the system gave it no memory
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise GenerationError(
            "This machine has too little memory for this video; use fewer frames or a smaller size."
        ) from error


def _used() -> str:
    """How much of the GPU's memory was in use, in brackets; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    gib = 2**30
    used, total = torch.cuda.max_memory_allocated() / gib, torch.cuda.get_device_properties().total_memory / gib
    return f" ({used:.1f} of {total:.1f} GiB were in use when more was asked for)"


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of any error on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
