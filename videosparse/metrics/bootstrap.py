"""How sure a mean is: percentile bootstrap over videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], draws: int = DRAWS) -> Interval:
    """Mean of at least one value with its 95 % percentile bootstrap interval; the same values give the same.

    A value that is inf (PSNR of equal videos) makes the mean inf.
    """
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(data), (draws, len(data)))
    means = data[picks].mean(axis=1)
    # sorted entries, not interpolation between them, which makes NaN of two infinite ones
    low, high = np.sort(means)[[round(0.025 * (draws - 1)), round(0.975 * (draws - 1))]]
    return Interval(float(data.mean()), float(low), float(high))
