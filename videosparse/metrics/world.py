"""What a video of the synthetic world shows: objects, their colour, shape and motion, found without learned weights.

Videos are [3, F, H, W], RGB in [0, 1]. The steps, each in its own file:

    blobs.py     pixels more colourful than the near-grey backgrounds, their connected parts, nearest colour in CIELAB,
                 and parts of successive frames joined by the cheapest assignment
    shapes.py    the outline whose rendering overlaps best with the part, over sizes and rotations
    motion.py    the family of paths that leaves the smallest residual in windows of two seconds

Positions, radii and residuals are fractions of the frame, as in ``videosparse.synthetic``. Needs SciPy (the extra
``eval``). Every detector is validated on rendered truth: ``python eval/score_world.py --validate 400``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from videosparse.metrics.blobs import (
    Blob,
    Floats,
    check_video,
    classify_background,
    measure,
    scipy_parts,
    segment_pixels,
    track,
)
from videosparse.metrics.motion import classify_motion
from videosparse.metrics.shapes import classify_shape, templates, whole_blobs
from videosparse.synthetic.captions import Expected
from videosparse.synthetic.render import ObjectState
from videosparse.synthetic.scene import SHAPES

# An object counts if it is there in this share of the frames.
MIN_ALIVE = 0.25


@dataclass(frozen=True)
class ObjectReport:
    """What was seen of one object.

    Args:
        colour: the palette colour of most of its frames.
        shape: one of ``SHAPES``, or "other".
        motion: one of ``MOTIONS``, or "other".
        radius: nominal radius of its shape, fraction of the shorter side.
        overlap: how well the shape covers it, 0..1.
        residuals: per motion, root-mean-square distance to the best such path.
        colour_error: mean CIELAB distance to its palette colour.
        alive: share of the frames in which it was seen.
        longest_gap: longest run of frames without it, the ends of the video included.
        switches: how often it took on another colour and kept it.
        jerk: mean third difference of its position, fractions of the frame per second cubed.
        speed_variation: standard deviation of its speed over its mean; 0 for an object at rest.
        radius_by_quarter: mean radius in each quarter of the video over its mean; NaN where it was not seen.
        colour_error_by_quarter: mean CIELAB distance to the palette in each quarter; NaN where it was not seen.
        path: frame index, x and y, [n, 3].
    """

    colour: str
    shape: str
    motion: str
    radius: float
    overlap: float
    residuals: dict[str, float]
    colour_error: float
    alive: float
    longest_gap: int
    switches: int
    jerk: float
    speed_variation: float
    radius_by_quarter: tuple[float, ...]
    colour_error_by_quarter: tuple[float, ...]
    path: Floats

    @property
    def residual(self) -> float:
        """Distance to the best path of the motion that was found, or of the nearest one."""
        return self.residuals.get(self.motion, min(self.residuals.values()))


@dataclass(frozen=True)
class WorldReport:
    """What was seen in one video.

    Args:
        objects: those there in at least a quarter of the frames, the most prominent first.
        background: one of ``BACKGROUNDS``, or "other" if the objects leave too little of it.
        frozen: share of the steps between two frames in which almost nothing changes.
    """

    objects: tuple[ObjectReport, ...]
    background: str
    frozen: float

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.objects)


def analyse(video: Tensor, *, fps: float = 16.0) -> WorldReport:
    """Say what a video of the synthetic world shows.

    Args:
        video: [3, F, H, W], RGB in [0, 1], on any device.
        fps: frames per second.

    Returns:
        The objects with colour, shape, motion and steadiness, and the background.

    Raises:
        ValueError: if the video has another number of dimensions or channels.
        ImportError: if SciPy is missing.
    """
    check_video(video)
    pixels = measure(video)
    frames, height, width = pixels.coloured.shape
    tracks = [blobs for blobs in track(segment_pixels(pixels)) if len(blobs) >= max(1.0, MIN_ALIVE * frames)]
    objects = tuple(_report(blobs, frames, height, width, fps) for blobs in tracks)
    steps = (video[:, 1:] - video[:, :-1]).abs().mean(dim=(0, 2, 3)) if frames > 1 else torch.zeros(0)
    frozen = float((steps < 1 / 2048).float().mean()) if frames > 1 else 0.0
    return WorldReport(objects, classify_background(pixels), frozen)


def _report(blobs: list[Blob], frames: int, height: int, width: int, fps: float) -> ObjectReport:
    shape, overlap = classify_shape(blobs)
    unit = templates()[2][templates()[0].index(shape if shape in SHAPES else "circle")]

    def radius_of(area: float) -> float:
        return math.sqrt(area / unit) / min(height, width)

    radius = radius_of(float(np.median([b.area for b in whole_blobs(blobs)])))
    motion, residuals = classify_motion(blobs, shape, radius, fps=fps)
    jerk, variation = _steadiness(blobs, fps)
    quarters = [[b for b in blobs if b.frame * 4 // frames == q] for q in range(4)]
    return ObjectReport(
        colour=Counter(b.colour for b in blobs).most_common(1)[0][0],
        shape=shape,
        motion=motion,
        radius=radius,
        overlap=overlap,
        residuals=residuals,
        colour_error=float(np.mean([b.colour_error for b in blobs])),
        alive=len(blobs) / frames,
        longest_gap=_longest_gap([b.frame for b in blobs], frames),
        switches=_switches([b.colour for b in blobs]),
        jerk=jerk,
        speed_variation=0.0 if motion == "static" else variation,
        radius_by_quarter=tuple(radius_of(_mean(b.area for b in q)) / radius for q in quarters),
        colour_error_by_quarter=tuple(_mean(b.colour_error for b in q) for q in quarters),
        path=np.array([(b.frame, b.x, b.y) for b in blobs]),
    )


def _mean(values: Iterable[float]) -> float:
    """Mean, NaN of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def _longest_gap(seen: Sequence[int], frames: int) -> int:
    """Longest run of frames that are not in ``seen``."""
    marks = [-1, *seen, frames]
    return max(after - before - 1 for before, after in pairwise(marks))


def _switches(colours: Sequence[str], *, hold: int = 3) -> int:
    """How often a sequence changes to another value and holds it for a few frames."""
    current, count = colours[0], 0
    for i in range(len(colours) - hold + 1):
        held = set(colours[i : i + hold])
        if len(held) == 1 and current not in held:
            current, count = colours[i], count + 1
    return count


def _steadiness(blobs: Sequence[Blob], fps: float) -> tuple[float, float]:
    """Mean jerk and relative variation of speed over the runs of frames without a gap."""
    where = {b.frame: (b.x, b.y) for b in blobs}
    runs = [[where[f + i] for i in range(4)] for f in where if all(f + i in where for i in range(4))]
    if not runs:
        return 0.0, 0.0
    points = np.array(runs)
    jerk = np.linalg.norm(np.diff(points, n=3, axis=1)[:, 0], axis=-1).mean() * fps**3
    speed = np.linalg.norm(points[:, 1] - points[:, 0], axis=-1)
    return float(jerk), float(speed.std() / max(speed.mean(), 1e-6))


def centre_error(seen: ObjectReport, truth: Sequence[Sequence[ObjectState]], number: int) -> float:
    """Mean distance between where an object was seen and where it was, over the frames in which it is visible.

    Args:
        seen: the object in the video.
        truth: of ``synthetic.states``, for the same frames.
        number: which object of the scene.

    Returns:
        Fraction of the frame; NaN if no visible frame was seen.
    """
    where = {frame: state[number] for frame, state in enumerate(truth) if state[number].visible}
    return _mean(math.hypot(x - where[f].x, y - where[f].y) for f, x, y in seen.path.tolist() if f in where)


def repetition(video: Tensor, *, min_lag: int) -> float:
    """How much a long video repeats itself: the greatest correlation of its frames with later ones.

    A world with periodic motion repeats itself too: subtract the value of the rendered truth.

    Args:
        video: [3, F, H, W], RGB in [0, 1].
        min_lag: smallest distance in frames, for example half the length of the training videos.

    Returns:
        Correlation in [-1, 1], of frames less their mean over time.

    Raises:
        ValueError: if the video has not at least 8 frames more than ``min_lag``.
    """
    check_video(video)
    frames = video.shape[1]
    if not 0 < min_lag <= frames - 8:
        raise ValueError(f"min_lag must be in 1..{frames - 8} for a video of {frames} frames (got {min_lag}).")
    small = torch.nn.functional.adaptive_avg_pool2d(video.transpose(0, 1).float(), 32).flatten(1)
    small = small - small.mean(dim=0)
    small = small / small.norm(dim=1, keepdim=True).clamp(min=1e-6)
    alike = small @ small.T
    return max(float(alike.diagonal(lag).mean()) for lag in range(min_lag, frames - 7))


@dataclass(frozen=True)
class Score:
    """What of a caption a video shows. None where the caption is silent.

    Args:
        colour: whether every named object has its colour.
        shape: whether every named object has its shape.
        motion: whether every named object moves as told.
        count: whether there are as many objects as named.
        background: whether the background is the one named.
        permanence: mean share of the frames in which the named objects were seen.
        longest_gap: longest run of frames without one of them.
        switches: how often they changed identity.
        detected: what was taken for each named object, None where nothing was.
    """

    colour: bool
    shape: bool
    motion: bool | None
    count: bool
    background: bool | None
    permanence: float
    longest_gap: int
    switches: int
    detected: tuple[ObjectReport | None, ...]

    @property
    def all_right(self) -> bool:
        """Whether nothing that the caption names is wrong."""
        return all(v is not False for v in (self.colour, self.shape, self.motion, self.count, self.background))


def score(report: WorldReport, expected: Expected, *, frames: int) -> Score:
    """Compare what a video shows with what its caption promises.

    As many objects as the caption names are judged, the most prominent ones, each paired with the named object that
    it resembles most.

    Args:
        report: of ``analyse``.
        expected: of ``parse_caption``.
        frames: number of frames of the video, the gap of an object that was never seen.
    """
    detected = _pair_up(report.objects[: expected.count], expected)
    pairs = list(zip(detected, expected.objects, strict=True))
    motions = [d is not None and d.motion == e.motion for d, e in pairs if e.motion]
    return Score(
        colour=all(d is not None and d.colour == e.colour for d, e in pairs),
        shape=all(d is not None and d.shape == e.shape for d, e in pairs),
        motion=all(motions) if motions else None,
        count=report.count == expected.count,
        background=None if expected.background is None else report.background == expected.background,
        permanence=float(np.mean([d.alive if d else 0.0 for d in detected])),
        longest_gap=max(d.longest_gap if d else frames for d in detected),
        switches=sum(d.switches for d in detected if d),
        detected=detected,
    )


def _pair_up(found: Sequence[ObjectReport], expected: Expected) -> tuple[ObjectReport | None, ...]:
    """For every expected object the found one that differs least from it, each used once."""
    if not found:
        return (None,) * expected.count
    _, optimize = scipy_parts()
    cost = np.array(
        [
            [4 * (d.colour != e.colour) + 2 * (d.shape != e.shape) + (d.motion != e.motion) for d in found]
            for e in expected.objects
        ]
    )
    pairs: list[ObjectReport | None] = [None] * expected.count
    for i, j in zip(*optimize.linear_sum_assignment(cost), strict=True):
        pairs[i] = found[j]
    return tuple(pairs)
