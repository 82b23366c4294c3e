"""Videos beyond the trained length: `extend_rope` and `context_windows`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from videosparse.components import targets
from videosparse.models import family_of
from videosparse.models.rope import extend, undo
from videosparse.windows import Windows, enter, leave


def extend_rope(
    pipe_or_transformer: object,
    kind: str,
    *,
    trained_frames: int | None = None,
    frames: int | None = None,
    k: int | None = None,
) -> None:
    """Stretch the temporal rotary embedding for videos beyond the trained length, in generation and in training.

    Stays until `restore`, or until it is called again; processors can be exchanged in between. See `RopeExtension` for
    what each kind does.

    Args:
        pipe_or_transformer: a Diffusers pipeline of Wan or HunyuanVideo, or its transformer.
        kind: "riflex", "ntk", "pi" (position interpolation), or "none", which undoes.
        trained_frames: pixel frames of the longest videos that the model was trained on; shorter videos are left
            alone. Needed by ntk and pi; None leaves riflex to decide by its period.
        frames: pixel frames to stretch to, so that training on clips of several lengths sees one embedding; None takes
            the length of each video.
        k: number of RIFLEx's frequency, from 1; None takes the published one.

    Raises:
        TypeError: not a supported pipeline or transformer.
        ValueError: Mochi, whose frequencies are learned; an unknown kind; missing or impossible numbers.
    """
    transformers = targets(pipe_or_transformer)[1]
    rotaries = [None if kind == "none" else family_of(t).temporal_rotary(t) for t in transformers]
    for transformer, rotary in zip(transformers, rotaries, strict=True):
        if rotary is None:
            undo(transformer)
        else:
            extend(transformer, rotary, kind, trained_frames=trained_frames, frames=frames, k=k)


@contextmanager
def context_windows(pipe_or_transformer: object, frames: int, overlap: int) -> Iterator[None]:
    """Call a pipeline's transformers by overlapping windows for the time of a block, and blend what they predict.

    ```python
    with videosparse.context_windows(pipe, frames=81, overlap=16):
        pipe("a cat surfing", num_frames=321)
    ```
    At every denoising step each window is one call of the transformer; processors, maps, rotary embeddings and memory
    are those of a video of `frames`. Videos that are no longer are left alone, bit by bit. Methods that search keep
    maps for each window. See `Windows` for weights.

    Args:
        pipe_or_transformer: a Diffusers pipeline of Wan, HunyuanVideo or Mochi, or its transformer.
        frames: pixel frames of a window, such as those that the model was trained on.
        overlap: pixel frames that neighbours share, whole latent frames: a multiple of 4 (Mochi: 6).

    Raises:
        TypeError: not a supported pipeline or transformer.
        ValueError: numbers that are no whole latent frames, or out of range.
        NotImplementedError: a model that is given frames beside the latents (image-to-video, VACE); a transformer that
            torch.compile holds as a whole.
        RuntimeError: windows in windows; at a call, a step cache.
    """
    transformers = targets(pipe_or_transformer)[1]
    parts = [pipe_or_transformer, *(getattr(pipe_or_transformer, n, None) for n in ("transformer", "transformer_2"))]
    if any(isinstance(part, torch.nn.Module) and hasattr(part, "_orig_mod") for part in parts):
        raise NotImplementedError(
            "torch.compile holds this transformer as a whole and would not see windows; use "
            "transformer.compile_repeated_blocks(fullgraph=True)."
        )
    windows = windows_of(family_of(transformers[0]).stride, frames, overlap)
    with ExitStack() as stack:
        for transformer in transformers:
            enter(transformer, windows)
            stack.callback(leave, transformer)
        yield


def windows_of(
    stride: int,
    frames: int,
    overlap: int,
    names: tuple[str, str] = ("frames of context windows", "overlap of context windows"),
) -> Windows:
    """Windows by pixel frames, where a latent frame after the first holds `stride` of them.

    `names` are what errors call the two numbers.

    Raises:
        ValueError: numbers that are no whole latent frames, or out of range.
    """
    for name, value in zip(names, (frames, overlap), strict=True):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a number of pixel frames (got {value!r}).")
    if frames < 1 + stride or (frames - 1) % stride:
        low = max(1, (frames - 1) // stride) * stride + 1
        raise ValueError(
            f"{names[0]} must be {stride}k+1, at least {1 + stride} (got {frames}); use {low} or {low + stride}."
        )
    most = (frames - 1) // stride * stride
    if not stride <= overlap <= most or overlap % stride:
        raise ValueError(
            f"{names[1]} must be a multiple of {stride} from {stride} to {most} (got {overlap}); use "
            f"{min(most, max(stride, overlap // stride * stride))}."
        )
    return Windows((frames - 1) // stride + 1, overlap // stride)
