"""How far a long video drifts from its beginning: the drift curve, which VBench does not have.

The video is cut into clips of two seconds. A clip's feature is the mean of its frames' features, at length 1. The curve
is the cosine of the first clip's feature and that of the clip dt seconds later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from videosparse.metrics.vbench.dimension import Context
from videosparse.metrics.video import Video

CLIP_SECONDS = 2.0

FEATURES = {"dino": "DINO ViT-B/16", "clip-b32": "CLIP ViT-B/32", "colour": "histogram of colours, no weights"}
"""What clips may be compared by."""

_BINS = 8  # a channel


@dataclass(frozen=True)
class DriftCurve:
    """How alike the first clip and later ones are.

    Args:
        feature: one of `FEATURES`.
        seconds: from the start of the first clip to that of each later one; starts with 0.
        cosine: of each, 1 at distance 0.
    """

    feature: str
    seconds: tuple[float, ...]
    cosine: tuple[float, ...]


def clip_bounds(video: Video, seconds: float = CLIP_SECONDS) -> list[tuple[int, int]]:
    """First frame and end of each clip. As in VBench-Long, a last piece too short reaches back for frames.

    A video that is shorter than one clip is one clip.

    Raises:
        ValueError: clips of less than two frames.
    """
    size = round(seconds * video.fps)
    if size < 2:
        raise ValueError(f"Clips need at least 2 frames (got {seconds} s at {video.fps:g} fps).")
    if len(video) <= size:
        return [(0, len(video))]
    starts = list(range(0, len(video) - size + 1, size))
    if starts[-1] + size < len(video):
        starts.append(len(video) - size)
    return [(start, start + size) for start in starts]


def clips(video: Video, seconds: float = CLIP_SECONDS) -> list[Video]:
    """The clips of a video, see `clip_bounds`."""
    return [video.part(start, stop) for start, stop in clip_bounds(video, seconds)]


def drift(
    video: Video, feature: str, context: Context | None = None, *, seconds: float = CLIP_SECONDS
) -> DriftCurve | None:
    """The drift curve of a video; None where it has only one clip.

    Args:
        video: to follow.
        feature: one of `FEATURES`.
        context: whose models are used.
        seconds: of a clip.

    Raises:
        MissingError: the feature's model cannot be had.
        ValueError: an unknown feature, or clips of less than two frames.
    """
    bounds = clip_bounds(video, seconds)
    if len(bounds) < 2:
        return None
    frames = _frame_features(video, feature, context or Context())
    means = functional.normalize(torch.stack([frames[a:b].mean(dim=0) for a, b in bounds]), dim=-1)
    cosine = (means @ means[0]).clamp(-1, 1)
    return DriftCurve(feature, tuple(a / video.fps for a, _ in bounds), tuple(float(x) for x in cosine))


def mean_curve(curves: Iterable[DriftCurve]) -> list[tuple[float, float, int]]:
    """Seconds, mean cosine and number of curves at each distance that any of the curves has."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        for seconds, cosine in zip(curve.seconds, curve.cosine, strict=True):
            at.setdefault(round(seconds, 3), []).append(cosine)
    return [(seconds, sum(values) / len(values), len(values)) for seconds, values in sorted(at.items())]


def _frame_features(video: Video, feature: str, context: Context) -> torch.Tensor:
    if feature not in FEATURES:
        raise ValueError(f"Unknown feature {feature!r} of a drift curve; known are {', '.join(FEATURES)}.")
    return colours(video) if feature == "colour" else context.features(feature, video)


def colours(video: Video) -> torch.Tensor:
    """Histogram of each frame's colours, 8 bins a channel, length 1, fp32 [frames, 512]."""
    found = []
    for frame in video.levels():
        bins = (frame.long() * _BINS) // 256
        index = (bins[..., 0] * _BINS + bins[..., 1]) * _BINS + bins[..., 2]
        found.append(torch.bincount(index.flatten(), minlength=_BINS**3).float())
    return functional.normalize(torch.stack(found), dim=-1)
