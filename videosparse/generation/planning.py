"""What a run will cost, worked out without weights: tokens, densities, attention work, memory, the map itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from videosparse.blocks import BlockMap
from videosparse.generation.errors import GenerationError
from videosparse.generation.families import Guidance
from videosparse.generation.lengths import context, far_logits, seen, trained_length
from videosparse.generation.linears import check_kind
from videosparse.generation.methods import Options, refusals, resolve_method, resolved_options, static_map
from videosparse.generation.request import GUIDANCES, MOST_STEPS, GenerationRequest, within
from videosparse.generation.sources import ModelSource, find_spec
from videosparse.generation.stack import Stack, check_offload, check_together, parts_of, sped_up
from videosparse.generation.step_cache import parse_step_cache
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.logits import FarLogits
from videosparse.policies.base import DenseSchedule, SparsityPolicy
from videosparse.processors import Resolved


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
        blocks: blocks of queries, of keys; block: (query rows, key rows) of one; None for dense.
        video_density: kept share of the blocks where both sides are video.
        density: kept share of all blocks, text and forced ones included.
        average_density: attention work of the run relative to dense, dense steps and layers included.
        searching_steps: steps that are dense beside the schedule: they search, or have nothing to search for.
        search: work of the searches of the run relative to that of all its attention, when dense.
        block_map: the map, None for dense and for a method that chooses blocks while it runs.
        index_bytes: the lists that kernels read, once per video shape.
        state_bytes: what a method that searches keeps between steps, by kind, for one layer and branch.
        build_seconds: time that map and lists took on this machine's CPU.
        logit: what is done to scores.
        windows: calls of the transformer a step and branch, each on the tokens of `layout`.
        compiled: whether blocks are compiled.
        linears: "none" or "fp8".
        offload: "none", "model" or "group".
        notices: what the user should know before, a sentence each.
    """

    source: ModelSource
    layout: TokenLayout
    steps: int
    branches: int
    schedule: DenseSchedule
    method: Options
    blocks: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    video_density: float = 1.0
    density: float = 1.0
    average_density: float = 1.0
    searching_steps: int = 0
    search: float = 0.0
    block_map: BlockMap | None = None
    index_bytes: int = 0
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    build_seconds: float = 0.0
    logit: FarLogits | None = None
    windows: int = 1
    compiled: bool = False
    linears: str = "none"
    offload: str = "none"
    notices: tuple[str, ...] = ()

    @property
    def grid(self) -> VideoGrid:
        """Video tokens after patching."""
        return self.layout.grid

    @property
    def dense_flops(self) -> float:
        """Self-attention of one dense step, all layers, branches and windows: 4 L^2 D H, a multiply-add being 2."""
        spec = self.source.spec
        return 4.0 * self.layout.length**2 * spec.head_dim * spec.heads * spec.layers * self.forwards

    @property
    def forwards(self) -> int:
        """Calls of the transformer a step."""
        return self.branches * self.windows

    @property
    def sparse_flops(self) -> float:
        """The same of one sparse step, its dense layers included."""
        layers, dense = self.source.spec.layers, self.dense_layers
        return self.dense_flops * (dense + (layers - dense) * self.density) / layers

    @property
    def dense_layers(self) -> int:
        """Layers that are dense in every step."""
        return min(self.source.spec.layers, self.schedule.first_layers + self.schedule.last_layers)

    @property
    def dense_run_flops(self) -> float:
        """The same of a whole run with dense attention."""
        return self.dense_flops * self.steps

    @property
    def run_flops(self) -> float:
        """The same of this run, its searches included."""
        return self.dense_run_flops * (self.average_density + self.search)

    @property
    def search_flops(self) -> float:
        """The part of it that is for searching."""
        return self.dense_run_flops * self.search

    @property
    def attention_bound(self) -> float:
        """The most that attention can gain over the whole run (Amdahl). What is not attention gains nothing."""
        return 1 / (self.average_density + self.search)

    @property
    def kept_bytes(self) -> int:
        """What a method that searches keeps between steps, over all layers, branches and windows."""
        searched = self.source.spec.layers - self.schedule.first_layers - self.schedule.last_layers
        return sum(self.state_bytes.values()) * max(0, searched) * self.forwards

    @property
    def sums_bytes(self) -> int:
        """What a search holds for the layer that it is in, beside that: the mass of every block, fp32."""
        rows, columns = self.blocks if self.state_bytes and self.blocks is not None else (0, 0)
        samples = self.branches if self.source.pipelines.guidance == Guidance.BATCH else 1
        return 4 * samples * self.source.spec.heads * rows * columns

    @property
    def map_bytes(self) -> int:
        """Memory of the map, a byte a block."""
        return 0 if self.block_map is None else self.block_map.keep.numel()

    def save_png(self, path: str | Path) -> None:
        """Draw the block map.

        Raises:
            GenerationError: dense attention has none, nor has a method that chooses blocks while it runs.
        """
        if self.blocks is not None and self.block_map is None:
            raise GenerationError(
                "This method chooses blocks while it runs: there is no block map to draw before; drop --png."
            )
        if self.block_map is None:
            raise GenerationError("Dense attention has no block map to draw; drop --png or choose a sparse method.")
        self.block_map.save_png(path)


def plan_request(request: GenerationRequest) -> GenerationPlan:
    """Work out the run of a request, as `GenerationRequest.resolve` would on a card that can do everything.

    Its prompt, seed, dtype and device do not matter. A step cache is not counted, nor the time that offloading takes.

    Raises:
        GenerationError: see `plan_run`; or LoRAs or accelerations that the request could not have.
    """
    request.check_words()
    source = find_spec(request.model)
    fitted = request.fitted(source)
    request, left_out = sped_up(fitted.request, source, None, torch.bfloat16)
    cached = parse_step_cache("none" if request.step_cache is None else request.step_cache) is not None
    linears = "none" if request.linears is None else request.linears
    check_kind(linears)
    check_offload(request.offload)
    stack = Stack(linears=linears, compiled=bool(request.compile), offload=request.offload)
    check_together(parts_of(request, stack, source.experts))
    for_rope = request.ultravico is None and (request.rope != "none" or request.usual_ultravico is not None)
    plan = plan_run(
        source,
        num_frames=fitted.num_frames,
        height=fitted.height,
        width=fitted.width,
        steps=fitted.steps,
        guidance=request.guidance,
        method=request.method,
        options=request.options.get(request.method),
        ultravico=request.ultravico,
        trained_frames=None if for_rope else request.trained_frames,
        context_frames=request.context_frames,
        context_overlap=request.context_overlap,
        beyond=[lora.frames for lora in fitted.loras if lora.frames is not None],
    )
    what = "What the step cache skips is not counted: that a run decides by itself."
    notices = (*left_out, *fitted.notices, *([what] if cached else []))
    return replace(plan, compiled=stack.compiled, linears=linears, offload=stack.offload, notices=notices)


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
    ultravico: float | None = None,
    trained_frames: int | None = None,
    context_frames: int | None = None,
    context_overlap: int | None = None,
    beyond: Iterable[int] = (),
) -> GenerationPlan:
    """Work out a run; what is None is taken from the model's defaults. `beyond`: lengths that LoRAs were trained for.

    Raises:
        GenerationError: sizes that the model cannot take, an unknown method, options that do not fit the model,
            `ultravico` in a video that the model was trained for, or `trained_frames` without it.
    """
    if trained_frames is not None and ultravico is None:
        raise GenerationError("trained_frames is for --ultravico; drop it, or give both.")
    defaults = source.defaults
    steps = within("steps", steps, defaults.steps, (1, MOST_STEPS))
    guidance = within("guidance", guidance, defaults.guidance, GUIDANCES)
    whole = source.grid(
        defaults.num_frames if num_frames is None else num_frames,
        defaults.height if height is None else height,
        defaults.width if width is None else width,
    )
    windows = context(source, context_frames, context_overlap)
    grid = seen(whole, windows)
    logit = far_logits(source, grid, ultravico, trained_length(source, trained_frames, beyond))
    calls = 1 if windows is None else len(windows.starts(whole.frames))
    layout = TokenLayout(grid, source.spec.text)
    guided = guidance > 1 and source.pipelines.guidance != Guidance.EMBEDDED
    branches = 2 if guided else 1
    resolved = resolve_method(source, grid, method, options, steps, logit)
    if resolved.policy is None:
        quant = resolved_options(resolved)
        return GenerationPlan(source, layout, steps, branches, resolved.schedule, quant, logit=logit, windows=calls)
    found = _static(resolved.policy, layout) or _searched(resolved, layout, source, steps)
    if found is None:
        raise GenerationError(
            f"{method} chooses blocks while it runs: there is no map to plan. Use generate --compare, which measures."
        )
    values = {
        "average_density": resolved.schedule.average_density(found["density"], steps, source.spec.layers),
        **found,
    }
    size = resolved.policy.block
    aligned = layout.aligned(size)
    return GenerationPlan(
        source,
        layout,
        steps,
        branches,
        resolved.schedule,
        resolved_options(resolved),
        blocks=(ceil_div(aligned.length, size[0]), ceil_div(aligned.length, size[1])),
        block=size,
        logit=logit,
        windows=calls,
        **values,
    )


def _static(policy: SparsityPolicy, layout: TokenLayout) -> dict[str, Any] | None:
    """What is known of a static map, by field of `GenerationPlan`; None when the method has none."""
    start = time.perf_counter()
    block_map = static_map(policy, layout)
    if block_map is None:
        return None
    with refusals():
        index = block_map.index()
    return {
        "build_seconds": time.perf_counter() - start,
        "video_density": block_map.video_density(layout),
        "density": block_map.density,
        "block_map": block_map,
        "index_bytes": index.bytes,
    }


def _searched(resolved: Resolved, layout: TokenLayout, source: ModelSource, steps: int) -> dict[str, Any] | None:
    """What is known before of maps that are searched for, likewise; None when the method cannot tell."""
    policy, schedule, spec = resolved.policy, resolved.schedule, source.spec
    assert policy is not None
    with refusals():
        both, state = policy.densities(layout), policy.state_bytes(layout, 1, spec.heads)
    if both is None:
        return None
    density, video_density = both
    searched = max(0, spec.layers - schedule.first_layers - schedule.last_layers) / spec.layers
    more_dense, passes = policy.search_work(schedule, steps, source.experts)
    average = schedule.average_density(density, steps, spec.layers) + searched * more_dense * (1 - density) / steps
    return {
        "video_density": video_density,
        "density": density,
        "average_density": average,
        "searching_steps": more_dense if searched else 0,
        "search": searched * passes / steps,
        "state_bytes": state,
    }
