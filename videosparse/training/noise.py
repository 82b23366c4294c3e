"""Noise levels of flow matching: how they are drawn, shifted, restricted, and where a run is dense.

A noise level s in (0, 1) mixes x_s = (1 - s) x0 + s eps. It is drawn as a quantile u of a distribution, so that a range
of levels is a range of quantiles, and nothing has to be rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()
# the ends of the logit-normal distribution lie at infinity
_EDGE = 1e-6


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of a run.

    Args:
        draw: "logit-normal" (mean 0, deviation 1, as for Stable Diffusion 3, arXiv 2403.03206) or "uniform".
        shift: k of s' = k s / (1 + (k - 1) s), which favours high noise; not always that of the videos made later.
        low, high: the levels that are trained, after the shift.
    """

    draw: str
    shift: float
    low: float = 0.0
    high: float = 1.0

    def level(self, quantile: float) -> float:
        """The noise level at a quantile in [0, 1] of the levels between `low` and `high`."""
        first, last = self.quantile(self.low), self.quantile(self.high)
        return self._level(first + quantile * (last - first))

    def quantile(self, level: float) -> float:
        """Share of all noise levels, whatever `low` and `high`, that lie below `level`."""
        t = level / (self.shift - (self.shift - 1) * level)
        if t <= 0 or t >= 1 or self.draw == "uniform":
            return min(1.0, max(0.0, t))
        return _NORMAL.cdf(math.log(t / (1 - t)))

    def share_above(self, level: float) -> float:
        """Share of the trained noise levels that lie above `level`."""
        first, last = self.quantile(self.low), self.quantile(self.high)
        return min(1.0, max(0.0, (last - self.quantile(level)) / (last - first)))

    def _level(self, u: float) -> float:
        u = min(1 - _EDGE, max(_EDGE, u))
        t = u if self.draw == "uniform" else 1 / (1 + math.exp(-_NORMAL.inv_cdf(u)))
        return shifted(t, self.shift)


def shifted(t: float, shift: float) -> float:
    """k t / (1 + (k - 1) t), as the flow-matching schedulers of Diffusers shift."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class RunSchedule:
    """The noise levels that a run at inference passes through.

    Args:
        shift: of the scheduler; see `NoiseLevels`.
        halves: whether levels fall by 2.5 % over the first half of the steps and quadratically over the second, as
            Diffusers' MochiPipeline has them; else they fall evenly before the shift.
    """

    shift: float
    halves: bool = False

    def level(self, done: float) -> float:
        """The noise level when a share `done` of the steps is done, in [0, 1]."""
        fallen = done
        if self.halves:
            fallen = 0.05 * done if done <= 0.5 else 3.8 * done**2 - 3.75 * done + 0.95
        return shifted(1 - fallen, self.shift)

    def dense_above(self, first_steps: float) -> float:
        """The noise level above which a run with this share of dense first steps is dense: training's form of that
        rule, whatever levels training draws.
        """
        return self.level(first_steps) if first_steps > 0 else 1.0
