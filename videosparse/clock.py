"""Which denoising step of which run a pipeline is in: `Clock`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from videosparse.copies import in_copy


def shift_of(config: Mapping[str, Any]) -> float | None:
    """The shift of the noise levels of a scheduler; None where it has none, or one that changes with the size."""
    shift = config.get("flow_shift", config.get("shift"))
    if isinstance(shift, bool) or not isinstance(shift, int | float) or config.get("use_dynamic_shifting"):
        return None
    return float(shift)


class Clock:
    """Which denoising step of which run a pipeline is in: one for all its transformers and branches.

    With a pipeline, the scheduler's `step_index` tells: a host value, None before the first step, the same for all
    branches. Pipelines made of the same components share the scheduler, so it also tells when another of them runs, and
    when the first is gone. Without one, or with a scheduler that lacks it, a changed timestep is a new step, and one
    that turns around, or a run of `num_steps`, a new run; reading it waits for the device.

    Args:
        pipeline: whose `scheduler` to read, or None.
        num_steps: steps of a run as told by the user; None asks the pipeline.
    """

    def __init__(self, pipeline: object | None, num_steps: int | None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._shared = getattr(pipeline, "scheduler", None)
        self._num_steps = num_steps
        self._ended = True
        self._mark: float | None = None
        self._timeline: object = None
        self._rising: bool | None = None
        self._total: int | None = None
        self._turn: int | None = None
        self.run = 0
        self.index = 0

    def __deepcopy__(self, memo: dict[int, object]) -> Clock:
        # the copy of a transformer alone serves the same pipeline, whose scheduler is not copied
        twin = copy.copy(self)
        if self._pipeline is not None and (ref := in_copy(self._pipeline, memo)) is not self._pipeline:
            twin._pipeline, twin._shared = ref, copy.deepcopy(self._shared, memo)
        return twin

    @property
    def follows(self) -> bool:
        """Whether a scheduler tells the step."""
        return self._scheduler() is not None

    def end(self) -> None:
        """The run is over: whatever comes next belongs to another."""
        self._ended = True

    def continues(self) -> bool:
        """Whether a scheduler says that the next forward belongs to the run so far; False where none tells."""
        scheduler = self._scheduler()
        return scheduler is not None and not self._ended and not self._is_fresh(scheduler)

    def tick(self, timestep: torch.Tensor | None) -> None:
        """Bring `run` and `index` up to date for a forward; `timestep` is the transformer's input, of any shape."""
        scheduler = self._scheduler()
        if scheduler is not None:
            self._follow(scheduler, timestep)
        else:
            self._watch(None if timestep is None else float(timestep.max()))
            self._total = getattr(self._alive(), "num_timesteps", None)

    def total(self) -> int | None:
        """Steps of this run, None when nobody says."""
        if self._num_steps is not None:
            return self._num_steps
        return self._total

    def shift(self) -> float | None:
        """Shift of the noise schedule of this run, None when nobody says."""
        return shift_of(getattr(self._scheduler(), "config", {}))

    def part(self, expert: int) -> tuple[int, int] | None:
        """(first, number) of the steps of this run that one of two experts makes; None where one makes all.

        As the pipeline does it: from the first step below its boundary of noise on, the second expert takes over.
        """
        if self._turn is None or self._total is None:
            return None
        return (self._turn, self._total - self._turn) if expert else (0, self._turn)

    def _taken_over(self, scheduler: Any) -> int | None:
        """The step of this run at which the second expert takes over; reading the timesteps waits for the device."""
        pipeline = self._alive()
        boundary = getattr(pipeline, "config", {}).get("boundary_ratio")
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        if boundary is None or trained is None or self._total is None:
            return None
        left = scheduler.timesteps.detach().cpu()[-self._total :]
        return int((left >= boundary * trained).sum())

    def _count(self, timesteps: torch.Tensor, first: torch.Tensor | None) -> int | None:
        """Steps of a run that walks `timesteps` from `first` on: video-to-video starts late.

        The pipeline's own number is exact, but stale when another pipeline of the same components is the one that
        runs. So it only decides where `first` was rounded (to bfloat16) on its way to the transformer.
        """
        known: int | None = getattr(self._alive(), "num_timesteps", None)
        if first is None:
            return known
        distance = (timesteps.detach().cpu().float() - float(first.max())).abs()
        left = len(timesteps) - int(distance.argmin())
        rounded = float(distance.min()) > 0
        return known if known is not None and rounded and abs(known - left) <= 1 else left

    def _alive(self) -> object | None:
        return None if self._pipeline is None else self._pipeline()

    def _scheduler(self) -> Any:
        """The scheduler of the pipeline, which its user may have exchanged; the last one known once it is gone."""
        alive = self._alive()
        if alive is not None:
            self._shared = getattr(alive, "scheduler", None)
        return self._shared if hasattr(self._shared, "step_index") else None

    def _follow(self, scheduler: Any, timestep: torch.Tensor | None) -> None:
        mark, timeline = scheduler.step_index, scheduler.timesteps
        if self._ended or self._is_fresh(scheduler):
            self._begin()
            self._total = self._count(timeline, timestep)
            self._turn = self._taken_over(scheduler)
        elif mark != self._mark:
            self.index += 1
        self._mark, self._timeline = mark, timeline

    def _is_fresh(self, scheduler: Any) -> bool:
        """Whether a scheduler has begun anew since the last forward."""
        mark = scheduler.step_index
        # set_timesteps makes a new tensor: that also tells a new run from one that failed in its first step
        if scheduler.timesteps is not self._timeline:
            return True
        return self._mark is not None and (mark is None or mark < self._mark)

    def _watch(self, mark: float | None) -> None:
        if self._ended:
            self._begin()
        elif mark is None or self._mark is None or mark != self._mark:
            rising = None if mark is None or self._mark is None else mark > self._mark
            turned = rising is not None and self._rising is not None and rising != self._rising
            full = self._num_steps is not None and self.index + 1 >= self._num_steps
            if turned or full:
                self._begin()
            else:
                self.index, self._rising = self.index + 1, rising
        self._mark = mark

    def _begin(self) -> None:
        self.run, self.index = self.run + 1, 0
        self._ended, self._rising = False, None
