"""Which motion of the synthetic world a path is: the family of paths that leaves the smallest residual."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from videosparse.metrics.blobs import OTHER, Blob, Floats, scipy_parts
from videosparse.metrics.shapes import MIN_POINTS, whole_blobs
from videosparse.synthetic.scene import MOTIONS, SHAPES, free_area

# Above this a path is none of the motions of the world.
MAX_RESIDUAL = 0.05
# A window whose positions spread less than this (root mean square) shows an object at rest.
STILL_SPREAD = 0.02
WINDOW_SECONDS = 2.0625


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
    _, optimize = scipy_parts()
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
    whole = whole_blobs(blobs)
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
