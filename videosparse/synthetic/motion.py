"""Where objects are at any time: one closed form for all five motions, batched over objects and times.

    x(t) = reflect(x + vx t, left, right) + amplitude * across(motion, rate t + phase)
    y(t) = reflect(y + vy t, top, bottom) + amplitude * down(motion, rate t + phase)

``reflect`` is the triangle wave of a bounce between two walls; ``across`` and ``down`` are the periodic part:
a circle for an orbit, parabolas above the floor for gravity (no energy is lost), a triangle wave for a zig-zag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from videosparse.synthetic.scene import MOTIONS, OUTLINES, SceneObject, free_area

PATH_COLUMNS = ("x", "y", "vx", "vy", "amplitude", "rate", "phase")


def path_table(objects: Sequence[SceneObject]) -> Tensor:
    """What ``centres`` needs of each object: float64 [N, 12], on the CPU."""
    rows = [
        [*(getattr(o, name) for name in PATH_COLUMNS), *free_area(o.shape, o.radius), float(MOTIONS.index(o.motion))]
        for o in objects
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(objects), len(PATH_COLUMNS) + 5)


def reflect(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Fold a straight path back and forth between two walls."""
    width = high - low
    along = torch.remainder(value - low, 2 * width)
    return low + torch.minimum(along, 2 * width - along)


def centres(table: Tensor, times: Tensor) -> Tensor:
    """Centres of the objects at the given times.

    Args:
        table: float64 [N, 12] of ``path_table``.
        times: float64 [T], seconds.

    Returns:
        float64 [N, T, 2]: x and y as fractions of the frame.
    """
    x, y, vx, vy, amplitude, rate, phase, left, right, top, bottom, motion = table[:, None, :].unbind(-1)
    cycle = rate * times + phase
    across, down = _periodic(motion, cycle)
    return torch.stack(
        (
            reflect(x + vx * times, left, right) + amplitude * across,
            reflect(y + vy * times, top, bottom) + amplitude * down,
        ),
        dim=-1,
    )


def _periodic(motion: Tensor, cycle: Tensor) -> tuple[Tensor, Tensor]:
    """The periodic part of each motion at a position in its cycle, rightwards and downwards, both [N, T]."""
    zero = torch.zeros_like(cycle)
    angle = 2 * math.pi * cycle
    part = cycle - cycle.floor()
    parabola = -4 * part * (1 - part)
    triangle = 1 - 4 * (part - 0.5).abs()
    orbit = motion == MOTIONS.index("orbit")
    across = torch.where(orbit, angle.cos(), zero)
    down = torch.where(orbit, angle.sin(), zero)
    down = torch.where(motion == MOTIONS.index("gravity"), parabola, down)
    down = torch.where(motion == MOTIONS.index("zigzag"), triangle, down)
    return across, down


def overlap_shares(
    pairs: Sequence[tuple[SceneObject, SceneObject]], *, seconds: float = 20.0, samples: int = 96
) -> list[float]:
    """Share of the first seconds during which the two objects of each pair touch."""
    times = torch.linspace(0.0, seconds, samples, dtype=torch.float64)
    where = centres(path_table([o for pair in pairs for o in pair]), times).reshape(len(pairs), 2, samples, 2)
    reach = [sum(o.radius * OUTLINES[o.shape].outer for o in pair) for pair in pairs]
    close = (where[:, 0] - where[:, 1]).norm(dim=-1) < torch.tensor(reach, dtype=torch.float64)[:, None]
    return [float(share) for share in close.double().mean(dim=1)]
