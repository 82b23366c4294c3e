"""The floor of a comparison: equally many random blocks in every row (`RandomProcessor`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from videosparse.blocks import BlockIndex
from videosparse.cases import ModelSpec
from videosparse.kernels import KernelOptions
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.metrics.attention import random_map
from videosparse.models import model_variant
from videosparse.policies.base import DenseSchedule, LayerPlan, LayerState, Mode, RunStep, SparsityPolicy, check_call
from videosparse.processors import Processor, Resolved


@dataclass(frozen=True)
class RandomPolicy(SparsityPolicy):
    """Equally many random blocks in every row, other ones in every layer, the same at every step and in every head.

    Args:
        density: share of the video blocks that a row keeps, rounded to whole blocks.
        block: (query rows, key rows).
    """

    density: float
    block: tuple[int, int] = (64, 64)

    name: ClassVar[str] = "random"
    pure: ClassVar[bool] = True

    def plan(
        self,
        layout: TokenLayout,
        run: RunStep,
        layer: int,
        state: LayerState,
        *,
        device: torch.device,
        samples: int = 1,
        heads: int = 1,
    ) -> LayerPlan:
        """Sparse, on the map of this layer."""
        check_call(layout, run, layer, state, device, samples, heads)
        aligned = layout.aligned(self.block)
        return LayerPlan(Mode.SPARSE, aligned, _random_index(self, aligned, layer, device))


@lru_cache(maxsize=128)
def _random_index(policy: RandomPolicy, layout: TokenLayout, layer: int, device: torch.device) -> BlockIndex:
    rows, cols = (ceil_div(layout.length, b) for b in policy.block)
    return random_map(torch.empty(1, 1, rows, cols, device=device), policy.density, layout, policy.block, layer).index()


@dataclass(frozen=True, eq=False, repr=False)
class RandomProcessor(Processor):
    """`RandomPolicy` after the dense steps that all methods of a comparison share.

    Args:
        density, block: see `RandomPolicy`.
        first_steps: dense denoising steps, an int or a fraction of the run.
        quant: integer attention, see `KernelOptions`.
    """

    density: float = 0.2
    block: tuple[int, int] = (64, 64)
    first_steps: int | float = 0.2
    quant: str | None = None

    def resolve(
        self, model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
    ) -> Resolved:
        """Nothing depends on the model."""
        schedule = DenseSchedule(first_steps=self.first_steps)
        policy = RandomPolicy(self.density, self.block)
        return Resolved(model_variant(model, experts=experts), policy, schedule, KernelOptions(quant=self.quant))
