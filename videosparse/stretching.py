"""Videos beyond the trained length: `extend_rope`."""

from __future__ import annotations

from videosparse.components import targets
from videosparse.models import family_of
from videosparse.models.rope import extend, undo


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
