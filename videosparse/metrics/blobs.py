"""Coloured parts of the frames of a video, and which of them are one object: pixels, blobs, tracks.

Videos are [3, F, H, W], RGB in [0, 1]. Positions are fractions of the frame. Needs SciPy (the extra ``eval``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from videosparse.synthetic.scene import COLOURS
from videosparse.wording import install_extra

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NAMES = tuple(COLOURS)
OTHER = "other"

# A pixel belongs to an object from this share of the chroma of the palette colour whose hue is nearest.
CHROMA_SHARE = 0.45
# Smaller parts are noise: a tenth of the smallest object.
MIN_AREA = 0.004


def scipy_parts() -> tuple[ModuleType, ModuleType]:
    """``scipy.ndimage`` and ``scipy.optimize``."""
    try:
        from scipy import ndimage, optimize
    except ImportError as error:
        raise ImportError(f"the detectors of the synthetic world need SciPy: {install_extra('eval')}") from error
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
class Pixels:
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


def measure(video: Tensor) -> Pixels:
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
    return Pixels(torch.cat(labs, 1).numpy(), torch.cat(chromas).numpy(), torch.cat(masks).numpy())


def segment(video: Tensor) -> list[list[Blob]]:
    """Find the coloured parts of every frame.

    Args:
        video: [3, F, H, W], RGB in [0, 1].

    Returns:
        F lists of blobs, the largest first.

    Raises:
        ValueError: if the video has another number of dimensions or channels.
    """
    check_video(video)
    return segment_pixels(measure(video))


def check_video(video: Tensor) -> None:
    """Raise ValueError unless a video is [3, F, H, W]."""
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(f"the video must be [3, frames, height, width] (got {list(video.shape)}).")


def segment_pixels(pixels: Pixels) -> list[list[Blob]]:
    """`segment` of pixels that are measured already."""
    ndimage, _ = scipy_parts()
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
    pixels: Pixels, mask: Bools, inner: Bools, frame: int, box: tuple[slice, slice], smallest: float
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
    ndimage, _ = scipy_parts()
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    core = ndimage.binary_erosion(mask, structure=np.ones((3, 3)))
    kept = [p for p in range(1, count + 1) if (parts == p).sum() >= smallest and (core & (parts == p)).sum() >= 4]
    return np.isin(parts, kept)


def _blob(pixels: Pixels, mask: Bools, voters: Bools, colour: int, frame: int, box: tuple[slice, slice]) -> Blob:
    """Measure one blob; ``mask`` and ``voters`` are [h, w] inside ``box``."""
    ndimage, _ = scipy_parts()
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
    _, optimize = scipy_parts()
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


def classify_background(pixels: Pixels) -> str:
    """The kind of background behind the objects, from the lightness of the pixels that are far from them."""
    ndimage, _ = scipy_parts()
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
