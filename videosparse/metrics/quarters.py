"""How a video of the synthetic world holds up over its length: each quarter judged as a video of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from videosparse.metrics.world import analyse, repetition, score
from videosparse.synthetic.captions import Expected

QUARTERS = 4
QUESTIONS = ("colour", "shape", "motion", "count", "background")


@dataclass(frozen=True)
class Quarter:
    """What one quarter of a video shows.

    Args:
        right: share of the questions about what the caption names that come out right, 0..1.
        permanence: mean share of the frames in which the named objects were seen.
        radius: mean radius of what was taken for them, fraction of the frame; NaN if nothing was.
        colour_error: mean distance from their palette colours in CIELAB; NaN if nothing was seen.
        frozen: share of the frames that hardly differ from the one before.
    """

    right: float
    permanence: float
    radius: float
    colour_error: float
    frozen: float


def quarters(video: Tensor, expected: Expected, fps: float) -> list[Quarter]:
    """Judge the quarters of a video.

    Args:
        video: float [3, F, H, W], RGB in [0, 1]; frames beyond a multiple of four are left out.
        expected: what its prompt promises.
        fps: frames per second.
    """
    frames = video.shape[1] // QUARTERS
    found = []
    for part in range(QUARTERS):
        clip = video[:, part * frames : (part + 1) * frames]
        report = analyse(clip, fps=fps)
        result = score(report, expected, frames=frames)
        answers = [getattr(result, question) for question in QUESTIONS]
        told = [bool(answer) for answer in answers if answer is not None]
        seen = [d for d in result.detected if d]
        radius, error = (
            float(np.mean([getattr(d, name) for d in seen])) if seen else math.nan
            for name in ("radius", "colour_error")
        )
        found.append(Quarter(sum(told) / len(told), result.permanence, radius, error, float(report.frozen)))
    return found


def drift(found: list[Quarter]) -> float:
    """How much of what was right in the first quarter is wrong in the last; negative where it gets better."""
    return found[0].right - found[-1].right


def extra_repetition(video: Tensor, truth: Tensor, min_lag: int) -> float:
    """How much more a video repeats itself than the true one does, both [3, F, H, W]; see `world.repetition`."""
    return repetition(video, min_lag=min_lag) - repetition(truth, min_lag=min_lag)
