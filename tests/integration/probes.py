"""Methods that exist for tests: they show what they were asked, or do what can be checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from videosparse.blocks import BlockMap
from videosparse.kernels import KernelOptions
from videosparse.policies.base import DenseSchedule, LayerPlan, Mode, SparsityPolicy
from videosparse.processors import Processor, Resolved, model_variant


@dataclass(frozen=True, eq=False)
class FullMap(SparsityPolicy):
    """Every block, through the sparse door: must equal dense attention. Keeps a count per (context, layer)."""

    pure: bool = True
    block: tuple[int, int] = (64, 64)
    log: list[Any] = field(default_factory=list)
    name: ClassVar[str] = "full"

    def plan(self, layout, run, layer, state, *, device, samples=1, heads=1):
        state["calls"] = state.get("calls", 0) + 1
        self.log.append((run, layer, state["calls"]))
        aligned = layout.aligned(self.block)
        return LayerPlan(Mode.SPARSE, aligned, BlockMap.full(aligned, self.block, device).index())


@dataclass(frozen=True, eq=False, repr=False)
class Probe(Processor):
    """Binds a `FullMap`; `seen()` are its (run, layer, calls with this state)."""

    policy: FullMap = field(default_factory=FullMap)
    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def resolve(self, model, *, experts=1, grid=None):
        return Resolved(model_variant(model, experts=experts), self.policy, self.schedule, KernelOptions())

    def steps(self):
        """(context, index, total) of every forward, told by its first layer."""
        return [(run.context, run.index, run.total) for run, layer, _ in self.policy.log if layer == 0]
