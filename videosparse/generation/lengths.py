"""Videos beyond the trained length, as a user asks for them: the trained length, far scores, and context windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from videosparse.generation.errors import GenerationError
from videosparse.generation.methods import refusals
from videosparse.generation.sources import ModelSource
from videosparse.layout import VideoGrid, ceil_div
from videosparse.logits import FarLogits, check_alpha
from videosparse.stretching import windows_of
from videosparse.windows import Windows

USUAL_OVERLAP = 16
"""Pixel frames that windows share, a second of most models."""


def trained_length(source: ModelSource, asked: int | None, beyond: Iterable[int] = ()) -> int:
    """Pixel frames of the longest videos that a model was trained on.

    Args:
        source: the model.
        asked: what the user says; None goes by what is known of the model.
        beyond: lengths that LoRAs were trained for.

    Raises:
        GenerationError: no length that the model can make.
    """
    trained = max([source.defaults.longest, *beyond]) if asked is None else asked
    stride = source.spec.stride[0]
    if trained < 1 or (trained - 1) % stride:
        raise GenerationError(
            f"trained_frames must be {stride}k+1 for {source.name} (got {trained}); the model's are "
            f"{source.defaults.longest}."
        )
    return trained


def far_logits(source: ModelSource, grid: VideoGrid, alpha: float | None, trained: int) -> FarLogits | None:
    """What is done to scores; None where nothing was asked for.

    Args:
        source: the model.
        grid: that attention sees.
        alpha: see `FarLogits`.
        trained: pixel frames.

    Raises:
        GenerationError: an alpha out of range, or a video, or windows, that the model was trained for.
    """
    if alpha is None:
        return None
    with refusals():
        check_alpha("ultravico", alpha)
    logit = FarLogits(source.spec.latent_frames(trained), alpha)
    if logit.reach(grid) is None:
        got = (grid.frames - 1) * source.spec.stride[0] + 1
        raise GenerationError(
            f"ultravico is for videos, or windows, longer than the {trained} frames that {source.name} was trained on "
            f"(got {got}); drop it, or ask for more frames."
        )
    return logit


def usual_logits(source: ModelSource, grid: VideoGrid, alpha: float, trained: int) -> tuple[FarLogits | None, str]:
    """What a preset does to scores: nothing, and a sentence that says so, where the model needs no help.

    Args:
        source, grid, alpha, trained: see `far_logits`.
    """
    logit = FarLogits(source.spec.latent_frames(trained), alpha)
    if logit.reach(grid) is not None:
        return logit, ""
    got = (grid.frames - 1) * source.spec.stride[0] + 1
    return None, (
        f"The preset's UltraViCo is left out: {got} frames at once are no more than the {trained} of training, a "
        "LoRA's included."
    )


def context(source: ModelSource, frames: int | None, overlap: int | None) -> Windows | None:
    """Windows that the transformer is called on; None for the whole video.

    Args:
        source: the model.
        frames, overlap: in pixels; overlap None is 16 or the next that the model can.

    Raises:
        GenerationError: numbers that are no whole latent frames, or out of range, or an overlap of nothing.
    """
    if frames is None:
        if overlap is not None:
            raise GenerationError("context_overlap is for --context-frames; drop it, or give both.")
        return None
    stride = source.spec.stride[0]
    usual = min(ceil_div(USUAL_OVERLAP, stride) * stride, max(stride, frames - 1 - (frames - 1) % stride))
    with refusals():
        return windows_of(stride, frames, usual if overlap is None else overlap, ("context_frames", "context_overlap"))


def seen(grid: VideoGrid, windows: Windows | None) -> VideoGrid:
    """What attention sees of a video: one window, where there are several."""
    return grid if windows is None else replace(grid, frames=min(grid.frames, windows.size))
