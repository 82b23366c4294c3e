"""What a video of the synthetic world shows: objects, their colour, shape and motion, found without learned weights.

Videos are [3, F, H, W], RGB in [0, 1]. The steps, each with its own function below:

    segment    pixels more colourful than the near-grey backgrounds, their connected parts, nearest colour in CIELAB
    track      parts of successive frames joined by the cheapest assignment
    shape      the outline whose rendering overlaps best with the part, over sizes and rotations
    motion     the family of paths that leaves the smallest residual in windows of two seconds

Positions, radii and residuals are fractions of the frame, as in ``videosparse.synthetic``. Needs SciPy (the extra
``eval``). Every detector is validated on rendered truth: ``python eval/score_world.py --validate 400``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from videosparse.synthetic.captions import Expected
from videosparse.synthetic.render import ObjectState, signed_distance
from videosparse.synthetic.scene import COLOURS, MOTIONS, OUTLINES, SHAPES, Outline, free_area

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NAMES = tuple(COLOURS)
OTHER = "other"

# A pixel belongs to an object from this share of the chroma of the palette colour whose hue is nearest.
CHROMA_SHARE = 0.45
# Smaller parts are noise: a tenth of the smallest object.
MIN_AREA = 0.004
# Below these a part is no shape of the world and a path none of its motions.
MIN_OVERLAP = 0.75
MAX_RESIDUAL = 0.05
# A window whose positions spread less than this (root mean square) shows an object at rest.
STILL_SPREAD = 0.02
WINDOW_SECONDS = 2.0625
# Any path fits fewer points.
MIN_POINTS = 8
# An object counts if it is there in this share of the frames.
MIN_ALIVE = 0.25


def _scipy() -> tuple[ModuleType, ModuleType]:
    """``scipy.ndimage`` and ``scipy.optimize``."""
    try:
        from scipy import ndimage, optimize
    except ImportError as error:
        raise ImportError('the detectors of the synthetic world need SciPy: pip install "videosparse[eval]"') from error
    return ndimage, optimize


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] to CIELAB under D65.

    Args:
        rgb: [3, ...].

    Returns:
        float32 [3, ...]: L* in [0, 100], a*, b*.
    """
    rgb = rgb.float().clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [
            [0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883],
        ],
        device=rgb.device,
    )
    xyz = torch.tensordot(to_xyz, linear, dims=1)
    f = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-6) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    return torch.stack((116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])))


@cache
def _palette() -> Tensor:
    """CIELAB of the palette, float32 [8, 3]."""
    return to_lab(torch.tensor([COLOURS[name] for name in NAMES]).T).T


@dataclass(frozen=True)
class Blob:
    """One connected part of one frame.

    Args:
        frame: index of the frame.
        colour: the palette colour that most of its inner pixels are nearest to.
        x: centroid, fraction of the width.
        y: centroid, fraction of the height.
        area: in pixels, edges counted by how much of them is covered.
        colour_error: CIELAB distance between the median inner pixel and the palette.
        weights: coverage in [0, 1] of the pixels around, [h, w].
        corner: row and column of the first of these pixels.
    """

    frame: int
    colour: str
    x: float
    y: float
    area: float
    colour_error: float
    weights: Floats
    corner: tuple[int, int]


@dataclass(frozen=True)
class _Pixels:
    """Per-pixel measurements of a clip, arrays [F, H, W] but ``lab`` [3, F, H, W]."""

    lab: NDArray[np.float32]
    chroma: NDArray[np.float32]
    coloured: Bools


@cache
def _needed_chroma() -> Tensor:
    """From which chroma a pixel of each hue, in whole degrees, belongs to an object: float32 [360]."""
    hues = torch.atan2(_palette()[:, 2], _palette()[:, 1])
    apart = torch.cos(torch.arange(360)[:, None] * (math.pi / 180) - hues)
    chroma = torch.hypot(_palette()[:, 1], _palette()[:, 2])
    return CHROMA_SHARE * chroma[apart.argmax(dim=1)]


def _measure(video: Tensor) -> _Pixels:
    """Where a clip is colourful; in chunks, because a long video has millions of pixels."""
    needed = _needed_chroma().to(video.device)
    labs, chromas, masks = [], [], []
    for part in torch.split(video, 32, dim=1):
        lab = to_lab(part)
        chroma = torch.hypot(lab[1], lab[2])
        hue = (torch.atan2(lab[2], lab[1]) * (180 / math.pi)).round().long() % 360
        labs.append(lab.cpu())
        chromas.append(chroma.cpu())
        masks.append((chroma >= needed[hue]).cpu())
    return _Pixels(torch.cat(labs, 1).numpy(), torch.cat(chromas).numpy(), torch.cat(masks).numpy())


def segment(video: Tensor) -> list[list[Blob]]:
    """Find the coloured parts of every frame.

    Args:
        video: [3, F, H, W], RGB in [0, 1].

    Returns:
        F lists of blobs, the largest first.

    Raises:
        ValueError: if the video has another number of dimensions or channels.
    """
    _check_video(video)
    return _segment(_measure(video))


def _check_video(video: Tensor) -> None:
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(f"the video must be [3, frames, height, width] (got {list(video.shape)}).")


def _segment(pixels: _Pixels) -> list[list[Blob]]:
    ndimage, _ = _scipy()
    frames, height, width = pixels.coloured.shape
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    labels, _ = ndimage.label(pixels.coloured, structure=in_plane)
    inner = ndimage.binary_erosion(pixels.coloured, structure=in_plane)
    found: list[list[Blob]] = [[] for _ in range(frames)]
    smallest = max(6.0, MIN_AREA * height * width)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        frame = box[0].start
        mask = labels[frame, box[1], box[2]] == label
        if mask.sum() >= smallest:
            found[frame] += _split(pixels, mask, inner[frame, box[1], box[2]], frame, box[1:], smallest)
    return [sorted(blobs, key=lambda b: -b.area) for blobs in found]


def _split(
    pixels: _Pixels, mask: Bools, inner: Bools, frame: int, box: tuple[slice, slice], smallest: float
) -> list[Blob]:
    """The blobs of one connected part: one per colour that a good share of its inner pixels votes for."""
    lab = pixels.lab[:, frame, box[0], box[1]].reshape(3, -1).T
    distance = np.linalg.norm(lab[:, None, :] - _palette().numpy()[None], axis=-1).reshape(*mask.shape, -1)
    voters = mask & inner if (mask & inner).sum() >= 4 else mask
    votes = np.bincount(distance[voters].argmin(axis=1), minlength=len(NAMES))
    present = np.flatnonzero(votes >= max(0.05 * votes.sum(), 0.4 * smallest))
    if len(present) < 2:
        return [_blob(pixels, mask, voters, int(votes.argmax()), frame, box)]
    nearest = present[distance[..., present].argmin(axis=-1)]
    blobs = []
    for colour in present:
        # What lies in pieces on both sides of an object in front of it is still one object.
        own = _thick_pieces(mask & (nearest == colour), smallest)
        if (own & voters).any():
            blobs.append(_blob(pixels, own, own & voters, int(colour), frame, box))
    return blobs


def _thick_pieces(mask: Bools, smallest: float) -> Bools:
    """The pieces of a mask that are large enough and no seam of mixed colour between two objects."""
    ndimage, _ = _scipy()
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    core = ndimage.binary_erosion(mask, structure=np.ones((3, 3)))
    kept = [p for p in range(1, count + 1) if (parts == p).sum() >= smallest and (core & (parts == p)).sum() >= 4]
    return np.isin(parts, kept)


def _blob(pixels: _Pixels, mask: Bools, voters: Bools, colour: int, frame: int, box: tuple[slice, slice]) -> Blob:
    """Measure one blob; ``mask`` and ``voters`` are [h, w] inside ``box``."""
    ndimage, _ = _scipy()
    height, width = pixels.coloured.shape[1:]
    median = np.median(pixels.lab[:, frame, box[0], box[1]][:, voters], axis=1)
    rows = slice(max(0, box[0].start - 2), min(height, box[0].stop + 2))
    columns = slice(max(0, box[1].start - 2), min(width, box[1].stop + 2))
    wide = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=bool)
    top, left = box[0].start - rows.start, box[1].start - columns.start
    wide[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    # The faint rim counts for as much as it covers, but not where it is another blob.
    rim = ndimage.binary_dilation(wide, iterations=1) & ~pixels.coloured[frame, rows, columns]
    share = pixels.chroma[frame, rows, columns] / max(float(np.hypot(median[1], median[2])), 1e-6)
    weights = np.where(wide | rim, np.clip(share, 0, 1), 0).astype(np.float64)
    area = float(weights.sum())
    x = float((weights.sum(axis=0) * (np.arange(columns.start, columns.stop) + 0.5)).sum() / area / width)
    y = float((weights.sum(axis=1) * (np.arange(rows.start, rows.stop) + 0.5)).sum() / area / height)
    error = float(np.linalg.norm(median - _palette()[colour].numpy()))
    return Blob(frame, NAMES[colour], x, y, area, error, weights, (rows.start, columns.start))


@dataclass
class _Track:
    blobs: list[Blob] = field(default_factory=list)

    @property
    def colour(self) -> str:
        return Counter(blob.colour for blob in self.blobs).most_common(1)[0][0]


def track(blobs: Sequence[Sequence[Blob]]) -> list[list[Blob]]:
    """Join the blobs of successive frames into objects.

    Args:
        blobs: per frame, as ``segment`` returns them.

    Returns:
        One list of blobs per object, in the order of time; the most prominent object first.
    """
    _, optimize = _scipy()
    tracks: list[_Track] = []
    for frame, present in enumerate(blobs):
        free = set(range(len(present)))
        if tracks and present:
            cost = np.array([[_cost(t, blob, frame) for blob in present] for t in tracks])
            for i, j in zip(*optimize.linear_sum_assignment(np.minimum(cost, 1e3)), strict=True):
                if cost[i, j] < 1e3:
                    tracks[i].blobs.append(present[j])
                    free.discard(int(j))
        tracks += [_Track([present[j]]) for j in sorted(free)]
    return [t.blobs for t in sorted(tracks, key=lambda t: -sum(b.area for b in t.blobs))]


def _cost(track: _Track, blob: Blob, frame: int) -> float:
    """What it costs to say that a blob continues a track; 1000 if it cannot."""
    last = track.blobs[-1]
    gap = frame - last.frame
    distance = math.hypot(blob.x - last.x, blob.y - last.y)
    if blob.colour == track.colour:
        return distance if distance <= min(0.14 + 0.1 * gap, 0.8) else 1e3
    return distance + 0.25 if distance <= 0.14 and gap <= 3 else 1e3


@cache
def _templates() -> tuple[list[str], list[Outline], Floats]:
    """Names, outlines and areas (of nominal radius 1) of what a blob is compared with."""
    names, outlines = [], []
    for shape in SHAPES:
        outline = OUTLINES[shape]
        turns = [i * 2 * math.pi / outline.corners / 6 for i in range(6)] if outline.corners else [0.0]
        names += [shape] * len(turns)
        outlines += [replace(outline, turn=outline.turn + turn) for turn in turns]
    axis = (torch.arange(400) + 0.5) / 400 * 3 - 1.5
    areas = (signed_distance(axis[None, None, :], axis[None, :, None], outlines) < 0).sum((1, 2)) * (3 / 400) ** 2
    return names, outlines, areas.double().numpy()


def shape_overlaps(blob: Blob) -> dict[str, float]:
    """How well each shape of the world covers a blob: intersection over union, 0..1, over rotations."""
    names, outlines, areas = _templates()
    weights = torch.from_numpy(blob.weights).float()
    total = weights.sum()
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in weights.shape)
    dx = columns - (weights.sum(0) * columns).sum() / total
    dy = rows - (weights.sum(1) * rows).sum() / total
    scale = torch.from_numpy(np.sqrt(float(total) / areas)).float()[:, None, None]
    distance = signed_distance(dx[None, None, :] / scale, dy[None, :, None] / scale, outlines) * scale
    covered = (0.5 - distance).clamp(0, 1)
    overlap = torch.minimum(covered, weights).sum((1, 2)) / torch.maximum(covered, weights).sum((1, 2))
    best: dict[str, float] = {}
    for name, value in zip(names, overlap.tolist(), strict=True):
        best[name] = max(value, best.get(name, 0.0))
    return best


def _whole(blobs: Sequence[Blob]) -> list[Blob]:
    """The blobs that nothing seems to cover, by their area; all if that leaves too few to see a motion."""
    usual = float(np.percentile([b.area for b in blobs], 75))
    whole = [b for b in blobs if 0.85 * usual <= b.area <= 1.2 * usual]
    return whole if len(whole) >= min(len(blobs), MIN_POINTS) else list(blobs)


def classify_shape(blobs: Sequence[Blob], *, samples: int = 9) -> tuple[str, float]:
    """The shape of one object and its mean overlap, from a few of its blobs; "other" below ``MIN_OVERLAP``."""
    whole = _whole(blobs)
    picked = [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, samples).round().astype(int))]
    scores = [shape_overlaps(blob) for blob in picked]
    mean = {shape: float(np.mean([s[shape] for s in scores])) for shape in SHAPES}
    best = max(mean, key=lambda shape: mean[shape])
    return (best if mean[best] >= MIN_OVERLAP else OTHER), mean[best]


def _wave(kind: str, cycle: Floats) -> Floats:
    """One cycle of a bounce (0 at the floor, 1 at the top) or of a zig-zag (-1 to 1), at positions in cycles."""
    part = cycle - np.floor(cycle)
    return 4 * part * (1 - part) if kind == "gravity" else 1 - 4 * np.abs(part - 0.5)


def _reflect(value: Floats, low: float, high: float) -> Floats:
    along = np.mod(value - low, 2 * (high - low))
    return low + np.minimum(along, 2 * (high - low) - along)


# Wider than what scenes draw, so that a model's object may be a little off and still show its motion.
RATES = {"orbit": (0.22, 1.0), "gravity": (0.55, 1.5), "zigzag": (0.65, 2.0)}
AMPLITUDES = {"orbit": (0.12, 0.34), "gravity": (0.25, 0.62), "zigzag": (0.07, 0.20)}


def _fit_wave(kind: str, t: Floats, values: Floats) -> float:
    """Mean squared residual of the best bounce or zig-zag: a search over rate and phase, refined twice."""
    low, high = AMPLITUDES[kind]
    # Upwards is negative; a zig-zag of negative amplitude is one of another phase.
    sign = -1.0 if kind == "gravity" else 1.0
    rates, phases = np.linspace(*RATES[kind], 40), np.linspace(0, 1, 40, endpoint=False)
    best = math.inf
    for _ in range(3):
        wave = sign * _wave(kind, rates[:, None, None] * t + phases[None, :, None])
        centred = wave - wave.mean(axis=-1, keepdims=True)
        power = (centred**2).mean(axis=-1)
        middle = values - values.mean()
        product = (centred * middle).mean(axis=-1)
        amplitude = np.clip(product / np.maximum(power, 1e-9), low, high)
        residual = (middle**2).mean() - 2 * amplitude * product + amplitude**2 * power
        i, j = np.unravel_index(int(residual.argmin()), residual.shape)
        best = min(best, float(residual[i, j]))
        rate_step, phase_step = rates[1] - rates[0], phases[1] - phases[0]
        rates = rates[i] + rate_step * np.linspace(-1, 1, 15)
        phases = phases[j] + phase_step * np.linspace(-1, 1, 15)
    return best


def _fit_reflected(t: Floats, values: Floats, low: float, high: float, fastest: float) -> float:
    """Mean squared residual of the best straight path between two walls, each of which may be a little off."""
    _, optimize = _scipy()
    speeds = np.linspace(-fastest, fastest, 2 * int(fastest / 0.02) + 1)
    starts = np.linspace(low, high, 24)
    paths = _reflect(starts[None, :, None] + speeds[:, None, None] * t, low, high)
    residual = ((paths - values) ** 2).mean(axis=-1)
    i, j = np.unravel_index(int(residual.argmin()), residual.shape)

    def miss(p: Floats) -> Floats:
        return _reflect(p[0] + p[1] * t, p[2], p[3]) - values

    first = np.array([starts[j], speeds[i], low, high])
    slack = np.array([0.15, 0.1, 0.035, 0.035])
    fit = optimize.least_squares(miss, first, bounds=(first - slack, first + slack), max_nfev=40)
    return min(float(residual[i, j]), float((fit.fun**2).mean()))


def _fit_orbit(t: Floats, x: Floats, y: Floats) -> float:
    """Mean squared residual (of x plus of y) of the best circle at constant angular speed."""
    low, high = AMPLITUDES["orbit"]
    slow, fast = RATES["orbit"]
    best = math.inf
    for rate in np.concatenate([np.linspace(slow, fast, 60), -np.linspace(slow, fast, 60)]):
        cos, sin = np.cos(2 * np.pi * rate * t), np.sin(2 * np.pi * rate * t)
        one, zero = np.ones_like(t), np.zeros_like(t)
        design = np.concatenate([np.stack([one, zero, cos, -sin], 1), np.stack([zero, one, sin, cos], 1)])
        target = np.concatenate([x, y])
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        radius = math.hypot(solution[2], solution[3])
        if radius > 0 and not low <= radius <= high:
            scale = min(max(radius, low), high) / radius
            rest = target - design[:, 2:] @ solution[2:] * scale
            solution = np.concatenate([[rest[: len(t)].mean(), rest[len(t) :].mean()], solution[2:] * scale])
        best = min(best, 2 * float(((design @ solution - target) ** 2).mean()))
    return best


def motion_residuals(t: Floats, x: Floats, y: Floats, area: tuple[float, float, float, float]) -> dict[str, float]:
    """Root-mean-square distance between a path and the best path of each motion.

    Args:
        t: seconds, [n]; at most about two, so that a small error in a rate stays small.
        x: fraction of the width, [n].
        y: fraction of the height, [n].
        area: where the centre of the object can be, as ``free_area`` returns it.

    Returns:
        One residual per motion, in fractions of the frame.
    """
    left, right, top, bottom = area
    t = t - t[0]
    across = _fit_reflected(t, x, left, right, 1.2)
    squared = {
        "static": float(x.var() + y.var()),
        "linear": across + _fit_reflected(t, y, top, bottom, 1.2),
        "orbit": _fit_orbit(t, x, y),
        "gravity": across + _fit_wave("gravity", t, y),
        "zigzag": across + _fit_wave("zigzag", t, y),
    }
    return {motion: math.sqrt(max(squared[motion], 0.0)) for motion in MOTIONS}


def classify_motion(
    blobs: Sequence[Blob], shape: str, radius: float, *, fps: float = 16.0
) -> tuple[str, dict[str, float]]:
    """The motion of one object: the smallest mean residual over windows of two seconds.

    Args:
        blobs: the object's blobs in the order of time.
        shape: its shape, which says where the walls are; "other" counts as a circle.
        radius: its nominal radius.
        fps: frames per second.

    Returns:
        The motion and the mean residual of each motion. The motion is "other" if no residual is below
        ``MAX_RESIDUAL`` or the object was seen in fewer than ``MIN_POINTS`` frames.
    """
    whole = _whole(blobs)
    t = np.array([b.frame / fps for b in whole])
    x, y = np.array([b.x for b in whole]), np.array([b.y for b in whole])
    area = free_area(shape if shape in SHAPES else "circle", min(radius, 0.3))
    residuals = [motion_residuals(t[w], x[w], y[w], area) for w in _windows(t)]
    mean = {motion: float(np.mean([r[motion] for r in residuals])) for motion in MOTIONS}
    if len(whole) < MIN_POINTS:
        return OTHER, mean
    if mean["static"] < STILL_SPREAD:
        return "static", mean
    best = min(MOTIONS, key=lambda motion: mean[motion])
    return (best if mean[best] <= MAX_RESIDUAL else OTHER), mean


def _windows(t: Floats) -> list[NDArray[np.int64]]:
    """Indices of half-overlapping windows of two seconds with enough points in each; all points if there is none."""
    starts = np.arange(t[0], max(t[-1] - 0.75 * WINDOW_SECONDS, t[0]) + 1e-9, WINDOW_SECONDS / 2)
    windows = [np.flatnonzero((t >= s - 1e-9) & (t < s + WINDOW_SECONDS)) for s in starts]
    return [w for w in windows if len(w) >= MIN_POINTS] or [np.arange(len(t))]


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
    _check_video(video)
    pixels = _measure(video)
    frames, height, width = pixels.coloured.shape
    tracks = [blobs for blobs in track(_segment(pixels)) if len(blobs) >= max(1.0, MIN_ALIVE * frames)]
    objects = tuple(_report(blobs, frames, height, width, fps) for blobs in tracks)
    steps = (video[:, 1:] - video[:, :-1]).abs().mean(dim=(0, 2, 3)) if frames > 1 else torch.zeros(0)
    frozen = float((steps < 1 / 2048).float().mean()) if frames > 1 else 0.0
    return WorldReport(objects, classify_background(pixels), frozen)


def _report(blobs: list[Blob], frames: int, height: int, width: int, fps: float) -> ObjectReport:
    shape, overlap = classify_shape(blobs)
    unit = _templates()[2][_templates()[0].index(shape if shape in SHAPES else "circle")]

    def radius_of(area: float) -> float:
        return math.sqrt(area / unit) / min(height, width)

    radius = radius_of(float(np.median([b.area for b in _whole(blobs)])))
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
    _check_video(video)
    frames = video.shape[1]
    if not 0 < min_lag <= frames - 8:
        raise ValueError(f"min_lag must be in 1..{frames - 8} for a video of {frames} frames (got {min_lag}).")
    small = torch.nn.functional.adaptive_avg_pool2d(video.transpose(0, 1).float(), 32).flatten(1)
    small = small - small.mean(dim=0)
    small = small / small.norm(dim=1, keepdim=True).clamp(min=1e-6)
    alike = small @ small.T
    return max(float(alike.diagonal(lag).mean()) for lag in range(min_lag, frames - 7))


def classify_background(pixels: _Pixels) -> str:
    """The kind of background behind the objects, from the lightness of the pixels that are far from them."""
    ndimage, _ = _scipy()
    plane = np.ones((1, 3, 3), dtype=bool)
    behind = ~ndimage.binary_dilation(pixels.coloured, structure=plane, iterations=3)
    light = np.where(behind, pixels.lab[0], np.nan)
    seen = behind.sum(axis=0)
    usable = seen >= 2
    if usable.sum() < 100:
        return OTHER
    values = light[:, usable]
    still = np.nanmedian(values, axis=0)
    if float(np.nanmean(np.abs(values - still))) > 2.5:
        return "stripes"
    rows, columns = np.nonzero(usable)
    design = np.stack([np.ones(len(rows)), rows / behind.shape[1], columns / behind.shape[2]], axis=1)
    solution = np.linalg.lstsq(design, still, rcond=None)[0]
    if float(np.abs(still - design @ solution).mean()) > 3.0:
        return "checker"
    return "gradient" if float(np.hypot(solution[1], solution[2])) > 8.0 else "flat"


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
    _, optimize = _scipy()
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
