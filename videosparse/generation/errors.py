"""What a user can get wrong, as one kind of error."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from videosparse.wording import nearest, one_line

__all__ = [
    "LONGEST",
    "OPTION_OF",
    "GenerationError",
    "calling",
    "memory_errors",
    "nearest",
    "one_line",
    "reason_of",
    "renamed",
    "told",
    "unwritable",
]


class GenerationError(ValueError):
    """A request that cannot be carried out; the message says what, why and what to do, in one line.

    A message about one value begins with the field of `GenerationRequest` that holds it: "num_frames must be ...". What
    users see of it may call that field otherwise, see `renamed`.
    """


OPTION_OF = {
    "num_frames": "--frames",
    "negative_prompt": "--negative-prompt",
    "trained_frames": "--trained-frames",
    "lora_scale": "--lora-scale",
    "ultravico": "--ultravico",
    "context_frames": "--context-frames",
    "context_overlap": "--context-overlap",
    **{
        name: f"--{name}"
        for name in ("height", "width", "steps", "guidance", "shift", "seed", "fps", "offload", "linears")
    },
}
"""How the command line and the programs call the fields that messages begin with."""

LONGEST = 1000
"""Letters of a message: what to do stands at its end, and must not be cut off."""

_PLACE = r"(?:Prompt \d+ of \d+: |.*, line \d+: )?"


def renamed(message: str, names: Mapping[str, str]) -> str:
    """A message that calls the field it is about as the user typed it; any other message as it is.

    Args:
        message: of a `GenerationError`, with or without the prompt that it is about before it.
        names: of fields, such as `OPTION_OF`.
    """
    found = re.match(rf"({_PLACE})(\w+)(?= must |=| is for )", message, re.S)
    if found is None or found[2] not in names:
        return message
    rest = message[found.end() :]
    return f"{found[1]}{names[found[2]]}{f' {rest[1:]}' if rest[0] == '=' else rest}"


@contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors of a block call fields by other names; see `renamed`."""
    try:
        yield
    except GenerationError as error:
        message = renamed(str(error), names)
        if message == str(error):
            raise
        raise GenerationError(message) from error


def told(error: BaseException, limit: int = LONGEST) -> str:
    """What a program says of an error: one line, which names options instead of fields."""
    return renamed(one_line(error, limit), OPTION_OF)


def unwritable(place: str | Path, error: OSError | ValueError) -> GenerationError:
    """That a file or a folder cannot be written, why, and what to do."""
    number = getattr(error, "errno", None)
    helps = "choose another folder"
    if number in (errno.ENOSPC, errno.EDQUOT):
        helps = "free some space, or choose another folder"
    return GenerationError(f"Cannot write {place}: {reason_of(error)}; {helps}.")


def reason_of(error: OSError | ValueError) -> str:
    """What the system says, without the path, which messages name."""
    return getattr(error, "strerror", None) or one_line(error)


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
