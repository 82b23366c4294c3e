"""What a run will cost, worked out without weights: tokens, densities, attention work, memory, the map itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from videosparse.blocks import BlockMap
from videosparse.generation.errors import GenerationError
from videosparse.generation.methods import Options, refusals, resolve_method, resolved_options, static_map
from videosparse.generation.request import GUIDANCES, MOST_STEPS, within
from videosparse.generation.sources import ModelSource
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.base import DenseSchedule


@dataclass(frozen=True, eq=False)
class GenerationPlan:
    """The attention of one run of one model with one method, by numbers.

    Args:
        source: the model.
        layout: the sequence that attention sees, without a gap.
        steps: denoising steps.
        branches: forwards of the transformer a step (2 under classifier-free guidance).
        schedule: where attention stays dense.
        method: its configuration for this model, by option; empty for dense.
        video_density: kept share of the blocks where both sides are video.
        density: kept share of all blocks, text and forced ones included.
        average_density: attention work of the run relative to dense, dense steps and layers included.
        block_map: the map, None for dense.
        index_bytes: the lists that kernels read, once per video shape.
        build_seconds: time that map and lists took on this machine's CPU.
    """

    source: ModelSource
    layout: TokenLayout
    steps: int
    branches: int
    schedule: DenseSchedule
    method: Options
    video_density: float = 1.0
    density: float = 1.0
    average_density: float = 1.0
    block_map: BlockMap | None = None
    index_bytes: int = 0
    build_seconds: float = 0.0

    @property
    def grid(self) -> VideoGrid:
        """Video tokens after patching."""
        return self.layout.grid

    @property
    def dense_flops(self) -> float:
        """Self-attention of one dense step, over all layers and branches: 4 L^2 D H, a multiply-add being 2."""
        spec = self.source.spec
        return 4.0 * self.layout.length**2 * spec.head_dim * spec.heads * spec.layers * self.branches

    @property
    def sparse_flops(self) -> float:
        """The same of one sparse step, its dense layers included."""
        layers = self.source.spec.layers
        dense = min(layers, self.schedule.first_layers + self.schedule.last_layers)
        return self.dense_flops * (dense + (layers - dense) * self.density) / layers

    @property
    def dense_run_flops(self) -> float:
        """The same of a whole run with dense attention."""
        return self.dense_flops * self.steps

    @property
    def run_flops(self) -> float:
        """The same of this run."""
        return self.dense_run_flops * self.average_density

    @property
    def attention_bound(self) -> float:
        """The most that attention can gain over the whole run (Amdahl). What is not attention gains nothing."""
        return 1 / self.average_density

    @property
    def map_bytes(self) -> int:
        """Memory of the map, a byte a block."""
        return 0 if self.block_map is None else self.block_map.keep.numel()

    def save_png(self, path: str | Path) -> None:
        """Draw the block map.

        Raises:
            GenerationError: dense attention has none.
        """
        if self.block_map is None:
            raise GenerationError("Dense attention has no block map to draw; drop --png or choose a sparse method.")
        self.block_map.save_png(path)


def plan_run(
    source: ModelSource,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    method: str = "radial",
    options: Options | None = None,
) -> GenerationPlan:
    """Work out a run; what is None is taken from the model's defaults.

    Raises:
        GenerationError: sizes that the model cannot take, an unknown method, or options that do not fit the model.
    """
    defaults = source.defaults
    steps = within("steps", steps, defaults.steps, (1, MOST_STEPS))
    guidance = within("guidance", guidance, defaults.guidance, GUIDANCES)
    grid = source.grid(
        defaults.num_frames if num_frames is None else num_frames,
        defaults.height if height is None else height,
        defaults.width if width is None else width,
    )
    layout = TokenLayout(grid, source.spec.text)
    guided = guidance > 1 and source.spec.family != "hunyuan_video"
    branches = 2 if guided else 1
    resolved = resolve_method(source, grid, method, options)
    policy = resolved.policy
    if policy is None:
        return GenerationPlan(source, layout, steps, branches, resolved.schedule, {})
    start = time.perf_counter()
    block_map = static_map(policy, layout)
    if block_map is None:
        raise GenerationError(
            f"{method} chooses blocks while it runs: there is no map to plan. Use generate --compare, which measures."
        )
    with refusals():
        index = block_map.index()
    seconds = time.perf_counter() - start
    density = block_map.density
    return GenerationPlan(
        source,
        layout,
        steps,
        branches,
        resolved.schedule,
        resolved_options(resolved),
        video_density=block_map.video_density(layout),
        density=density,
        average_density=resolved.schedule.average_density(density, steps, source.spec.layers),
        block_map=block_map,
        index_bytes=index.bytes,
        build_seconds=seconds,
    )
