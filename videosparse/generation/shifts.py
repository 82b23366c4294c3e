"""Another shift of the noise levels of a run, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from videosparse.generation.errors import GenerationError


@contextmanager
def shifted(pipe: Any, shift: float | None) -> Iterator[None]:
    """A scheduler of another shift, for the time of a block."""
    before = pipe.scheduler
    if shift is None:
        yield
        return
    name = next((name for name in ("flow_shift", "shift") if name in before.config), None)
    if name is None:
        raise GenerationError(f"{type(before).__name__} has no shift to set; drop --shift.")
    pipe.scheduler = type(before).from_config(before.config, **{name: shift})
    try:
        yield
    finally:
        pipe.scheduler = before
