"""Which shape of the synthetic world a blob is: the outline whose rendering overlaps best with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from videosparse.metrics.blobs import OTHER, Blob, Floats
from videosparse.synthetic.render import signed_distance
from videosparse.synthetic.scene import OUTLINES, SHAPES, Outline

# Below this a part is no shape of the world.
MIN_OVERLAP = 0.75
# Any path, and any mean outline, fits fewer points.
MIN_POINTS = 8


@cache
def templates() -> tuple[list[str], list[Outline], Floats]:
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
    names, outlines, areas = templates()
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


def whole_blobs(blobs: Sequence[Blob]) -> list[Blob]:
    """The blobs that nothing seems to cover, by their area; all if that leaves too few to see a motion."""
    usual = float(np.percentile([b.area for b in blobs], 75))
    whole = [b for b in blobs if 0.85 * usual <= b.area <= 1.2 * usual]
    return whole if len(whole) >= min(len(blobs), MIN_POINTS) else list(blobs)


def classify_shape(blobs: Sequence[Blob], *, samples: int = 9) -> tuple[str, float]:
    """The shape of one object and its mean overlap, from a few of its blobs; "other" below ``MIN_OVERLAP``."""
    whole = whole_blobs(blobs)
    picked = [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, samples).round().astype(int))]
    scores = [shape_overlaps(blob) for blob in picked]
    mean = {shape: float(np.mean([s[shape] for s in scores])) for shape in SHAPES}
    best = max(mean, key=lambda shape: mean[shape])
    return (best if mean[best] >= MIN_OVERLAP else OTHER), mean[best]
