"""What the log says of a run when it begins: that it will not be what was asked for."""

from __future__ import annotations

import logging

from videosparse.layout import VideoGrid
from videosparse.processors import Resolved

logger = logging.getLogger(__name__)

# Share of dense steps to suggest: the published 12 of 50.
_USUAL_SHARE = 0.24


def say_if_left_alone(resolved: Resolved, grid: VideoGrid) -> None:
    """Say so where a logit was asked for, and the video is short enough to do without."""
    logit = resolved.options.logit
    if logit is not None and logit.reach(grid) is None:
        logger.info("%s leaves this video alone: it has %d latent frames.", logit, grid.frames)


def warn_if_unlike(resolved: Resolved, shift: float | None) -> None:
    """Say so where a method was made ready for other runs than this one."""
    if resolved.policy is not None and (why := resolved.policy.unlike(shift)):
        logger.warning("%s", why)


def warn_if_all_dense(resolved: Resolved, total: int | None) -> None:
    """Say so when the dense steps leave no sparse one."""
    if resolved.policy is None or total is None:
        return
    schedule = resolved.schedule
    dense = sum(schedule.dense_steps(total))
    if dense == 0 and total == 1 and resolved.policy.searches:
        logger.warning("A run of one step has no map to search for: every call is dense; use at least 2 steps.")
    if dense >= total:
        logger.warning(
            "first_steps=%s and last_steps=%s cover all %d steps of this run: every call is dense; use %d, or the "
            "fraction %s.",
            schedule.first_steps,
            schedule.last_steps,
            total,
            int(_USUAL_SHARE * total + 0.5),
            _USUAL_SHARE,
        )
