"""From a few prompts to a plan of PAROAttention (arXiv 2506.16054): what `videosparse calibrate` is made of.

Every prompt is generated once, densely. One step of each part of the run is looked at: five parts of the first half,
and the second half as a whole. From all of them each head gets its token order; then, from the same calls made again,
part by part, the blocks that hold most in that order.

Where two experts share a run (Wan2.2-A14B), the pipeline decides which of them makes a step, and the steps of each have
parts of their own.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videosparse.blocks import check_block
from videosparse.clock import shift_of
from videosparse.defaults import block_for
from videosparse.generation.claiming import claimed
from videosparse.generation.environment import now, versions
from videosparse.generation.errors import GenerationError, memory_errors, unwritable
from videosparse.generation.looking import Columns, Figures, MapSums, Shares, Watch, columns_for, watching
from videosparse.generation.lora import check_loaded
from videosparse.generation.methods import refusals
from videosparse.generation.output import Destination, check_place, check_places
from videosparse.generation.partial import Extent, Partial
from videosparse.generation.request import GenerationRequest, Settings
from videosparse.generation.running import Progress, call_arguments, load_pipeline, quiet
from videosparse.generation.shifts import shifted
from videosparse.generation.states import digest, file_state
from videosparse.kernels.order_search import OrderMetric
from videosparse.kernels.selection import columns_of, kernels_for
from videosparse.layout import ceil_div
from videosparse.policies.paro import DENSITY
from videosparse.policies.paro_plan import (
    PAROPlan,
    PlanFacts,
    bucket_of,
    config_hash,
    fingerprint,
    full_fingerprint,
    plain_config,
)
from videosparse.stretching import extend_rope

BUCKETS = 5

LEAST_DENSITY = 0.05
"""The fewest blocks that `mass` leaves a head."""

_LIMITS = {"density": (0.0, 1.0), "mass": (0.0, 1.0)}


@dataclass(frozen=True)
class CalibrationRequest:
    """A plan to make. What is None is taken from the model's defaults.

    Args:
        prompts: one or two that are typical.
        model, num_frames, height, width, steps, guidance, shift, device, dtype, offload: see `GenerationRequest`. The
            plan is for this model and size. The shift decides at which noise the parts of the run lie, and how many
            steps each of two experts makes; a run with another one is told so.
        loras, lora_scales: see `GenerationRequest`: a plan knows the attention of the model with them.
        density: share of the video blocks that every row keeps, in (0, 1]; None takes .2, unless `mass` decides.
        mass: share of the attention among video tokens that each head keeps, in (0, 1], with as few blocks a row as
            that takes, but 5 % of them; instead of `density`.
        block: (query rows, key rows) of the maps, each 64 or 128; None takes (128, 64), and (64, 64) where frames have
            fewer than 512 tokens.
        buckets: parts of the first half of a run with maps of their own. Each needs a step, so the default of 5 needs
            runs of at least 10; where experts share a run, at least 10 of each.
        alpha: weight of sparsity against evenness in the choice of orders, 0..1; None takes .5, which is ours. Not
            with order_by="mass".
        order_by: how a head's order is chosen: "metric" is the paper's; "mass", ours, takes the one in which the
            largest blocks of every row, as many as `density` says, hold most of the attention, or in which the fewest
            hold `mass`, mean over the calls that are looked at.
        reorder: whether heads get token orders at all; False leaves all in raster order, for comparisons.
        seed: of the noise of the first prompt; each further one takes the next.
    """

    prompts: Sequence[str]
    model: str | None = None
    density: float | None = None
    mass: float | None = None
    block: tuple[int, int] | None = None
    buckets: int = BUCKETS
    alpha: float | None = None
    order_by: str = "metric"
    reorder: bool = True
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    loras: tuple[str, ...] = ()
    lora_scales: tuple[float, ...] = ()

    def resolve(self) -> CalibrationSettings:
        """Fill the gaps and check everything that can be checked without loading weights.

        Raises:
            GenerationError: the first thing that is wrong.
        """
        if not self.prompts:
            raise GenerationError("There is no prompt to calibrate with; give one or two, a line each.")
        runs = tuple(self._run(prompt, self.seed + number) for number, prompt in enumerate(self.prompts))
        first = runs[0]
        block = block_for(first.grid) if self.block is None else self.block
        with refusals():
            check_block(block)
            metric = OrderMetric(OrderMetric.alpha if self.alpha is None else self.alpha, by=self.order_by)
        for name, limits in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limits[0] < value <= limits[1]:
                raise GenerationError(f"{name} must lie in 0..1, 0 excluded (got {value}).")
        if self.density is not None and self.mass is not None:
            raise GenerationError("density and mass both say how many blocks are kept; give one of them.")
        if metric.by == "mass":
            self._check_by_mass()
        _check_buckets(self.buckets, first.steps)
        density = DENSITY if self.density is None and self.mass is None else self.density
        return CalibrationSettings(self, runs, metric, density, block)

    def _check_by_mass(self) -> None:
        """Raise GenerationError where orders cannot be chosen by mass, or something else chooses them."""
        if self.alpha is not None:
            raise GenerationError(
                f"alpha={self.alpha} weighs the paper's metric, and orders are to be chosen by mass; drop one of both."
            )
        if not self.reorder:
            raise GenerationError("order_by=mass chooses orders, and reorder=False leaves all in raster order.")

    def _run(self, prompt: str, seed: int) -> Settings:
        return GenerationRequest(
            prompt, model=self.model, method="dense", num_frames=self.num_frames, height=self.height, width=self.width,
            steps=self.steps, guidance=self.guidance, shift=self.shift, seed=seed, device=self.device, dtype=self.dtype,
            offload=self.offload, loras=self.loras, lora_scales=self.lora_scales,
        ).resolve()  # fmt: skip


@dataclass(frozen=True)
class CalibrationSettings:
    """A request with every gap filled.

    Args:
        request: what was asked.
        runs: the dense run of each prompt.
        metric: how orders are judged.
        density: see `CalibrationRequest`; None where `request.mass` decides.
        block: (query rows, key rows) of the maps.
    """

    request: CalibrationRequest
    runs: tuple[Settings, ...]
    metric: OrderMetric
    density: float | None
    block: tuple[int, int]

    @property
    def looked_at(self) -> dict[int, int]:
        """Bucket of each step that is looked at, of a run that one transformer makes."""
        return _middles(self.runs[0].steps, self.request.buckets)

    def looked_at_of(self, expert: int, own: int | None) -> dict[int, int]:
        """The same of the `own` steps of an expert, counted from its first; a `looking.StepsOf`.

        Raises:
            GenerationError: the experts of this run have too few steps, or nobody says when they take turns.
        """
        run = self.runs[0]
        if run.source.experts == 1:
            return self.looked_at
        if own is None:
            raise GenerationError(
                f"{run.source.name} has {run.source.experts} experts and does not say when the second takes over; set "
                "boundary_ratio in its model_index.json."
            )
        for number in (expert, 1 - expert):
            steps = own if number == expert else run.steps - own
            _check_buckets(self.request.buckets, steps, f" that expert {number + 1} makes of {run.steps}")
        return _middles(own, self.request.buckets)

    def asked(self, pipe: Any, configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What decides the statistics, as plain values.

        Args:
            pipe: loaded, with the scheduler of the run.
            configs: of its transformers.
        """
        request, run = self.request, self.runs[0]
        return {
            "model": run.source.name,
            "configuration": [config_hash(plain_config(config)) for config in configs],
            **_loaded(pipe),
            "frames": run.num_frames,
            "height": run.height,
            "width": run.width,
            "steps": run.steps,
            "guidance": run.guidance,
            "seed": request.seed,
            "dtype": run.dtype,
            "prompts": _hash(request.prompts),
            "density": self.density,
            "mass": request.mass,
            "block": list(self.block),
            "buckets": request.buckets,
            "order_by": self.metric.by,
            "alpha": self.metric.alpha,
            "reorder": request.reorder,
            "loras": [[*file_state(lora.path), lora.scale] for lora in run.loras],
        }


@dataclass(frozen=True, eq=False)
class Calibration:
    """A finished calibration.

    Args:
        plan: what was found; it is saved.
        path: where.
        settings: what was asked.
        resumed: whether it went on from an interrupted one.
        seconds: wall seconds, loading left out.
        load_seconds: of loading the pipeline; None when it was given.
    """

    plan: PAROPlan
    path: Path
    settings: CalibrationSettings
    resumed: bool
    seconds: float
    load_seconds: float | None


def check_output(output: str | Path, overwrite: bool) -> Path:
    """Where the plan goes; decided before anything expensive runs. Nothing is made.

    Raises:
        GenerationError: another ending, a name that is taken or too long, or a folder that cannot be written.
    """
    path = Path(output)
    if path.suffix != ".safetensors":
        name = path.stem or "plan"  # what is empty is the folder one is in
        raise GenerationError(f"A plan must end in .safetensors (got {str(output)!r}); use {name}.safetensors.")
    check_places([Destination(path.parent, path.stem, (path.suffix,), overwrite=overwrite)])
    check_place(Partial.path(path))  # which has the longer name
    return path


def calibrate(
    request: CalibrationRequest,
    output: str | Path,
    *,
    overwrite: bool = False,
    pipe: Any = None,
    progress: Progress = quiet,
) -> Calibration:
    """Make a plan and save it.

    What is known is saved beside it after every prompt and every map, as `<output>.partial`, from which a rerun goes
    on; the file is gone when the plan is there. The same request gives the same plan, byte for byte on the same
    machine.

    Args:
        request: what to make.
        output: a .safetensors file.
        overwrite: replace it if it exists, and statistics that do not belong to this request.
        pipe: a pipeline of the request's model, loaded and placed; None loads it.
        progress: told about every phase: "load", "1/2 denoise" and so on, "maps".

    Raises:
        GenerationError: anything that cannot be carried out, another process that calibrates into the same file, and
            statistics that are no numbers. No plan is written then.
    """
    settings = request.resolve()
    path = check_output(output, overwrite)
    with claimed(path):
        check_output(path, overwrite)  # another process may have made it since
        return _calibrated(settings, path, overwrite, pipe, progress)


def _calibrated(
    settings: CalibrationSettings, path: Path, overwrite: bool, pipe: Any, progress: Progress
) -> Calibration:
    load_seconds, run, buckets = None, settings.runs[0], settings.request.buckets
    if pipe is None:
        pipe, load_seconds = load_pipeline(run, progress)
    begin = now(run.device)
    check_loaded(pipe, run.loras)
    with watching(pipe, run.device) as watch, memory_errors(), shifted(pipe, run.shift):
        with refusals():  # a LoRA may have been trained so; the watch gives the pipeline its own back
            extend_rope(pipe, run.request.rope, trained_frames=run.trained_frames)
        _check_experts(watch, settings)
        partial, resumed = _begin(Partial.path(path), watch, settings, overwrite)
        _look_at_prompts(watch, settings, partial, Partial.path(path), progress)
        codes = _codes(watch, settings, partial)
        _find_maps(watch, settings, partial, codes, Partial.path(path), progress)
        plan = PAROPlan(
            codes, _by_layer(partial.counts, buckets + 1), _by_layer(partial.bits, buckets + 1),
            _facts(settings, watch, partial), path.name,
        )  # fmt: skip
    _save(plan, path, overwrite)
    return Calibration(plan, path, settings, resumed, time.perf_counter() - begin, load_seconds)


def _save(plan: PAROPlan, path: Path, overwrite: bool) -> None:
    """Write a plan, and remove what is not needed any more."""
    partial = Partial.path(path)
    try:
        plan.save(path, overwrite)
        partial.unlink(missing_ok=True)
    except FileExistsError:
        raise GenerationError(
            f"{path} was written by something else meanwhile; give the same command with --overwrite, or move it away "
            f"first: all of this calibration is in {partial}."
        ) from None
    except OSError as error:
        raise unwritable(path, error) from error


def _middles(steps: int, buckets: int) -> dict[int, int]:
    """Bucket of each step that is looked at: the middle one of every bucket's."""
    of = [bucket_of(step, steps, buckets) for step in range(steps)]
    members = {bucket: [s for s in range(steps) if of[s] == bucket] for bucket in sorted(set(of))}
    return {own[len(own) // 2]: bucket for bucket, own in members.items()}


def _check_buckets(buckets: int, steps: int, whose: str = "") -> None:
    """Raise GenerationError unless each part of the first half of so many steps has one; `whose` follows "steps"."""
    if buckets < 1:
        raise GenerationError(f"buckets must be at least 1 (got {buckets}).")
    if steps < 2:
        raise GenerationError(f"Calibration needs at least 2 steps{whose} (got {steps}); raise --steps.")
    if buckets > steps // 2:
        raise GenerationError(
            f"buckets must be 1 to {steps // 2}, half of the {steps} steps{whose}, so that each has one (got "
            f"{buckets}); lower --buckets, or raise --steps: {buckets} need at least {2 * buckets}."
        )


def _check_experts(watch: Watch, settings: CalibrationSettings) -> None:
    """Raise GenerationError unless all transformers that share the run are there, and alike."""
    source, found = settings.runs[0].source, watch.trackers
    if len(found) != source.experts:
        raise GenerationError(
            f"{source.name} has {source.experts} experts, and {len(found)} of them are loaded; a plan holds all: "
            "calibrate with the whole pipeline."
        )
    sizes = {(len(tracker.layers), int(tracker.config["num_attention_heads"])) for tracker in found}
    if len(sizes) > 1:
        raise GenerationError(f"The experts differ in layers or heads ({sorted(sizes)}), which a plan cannot hold.")


def _by_layer(maps: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """[attentions, maps, ...] from maps [layers, ...]: `count` of the first expert, then as many of the next."""
    return torch.cat([torch.stack(list(maps[i : i + count]), 1) for i in range(0, len(maps), count)])


def _begin(path: Path, watch: Watch, settings: CalibrationSettings, overwrite: bool) -> tuple[Partial, bool]:
    """(what is known already, whether anything is)."""
    asked = settings.asked(watch.pipe, [tracker.config for tracker in watch.trackers])
    if not path.exists():
        return Partial(asked), False
    experts, run = len(watch.trackers), settings.runs[0]
    rows, columns = (ceil_div(run.grid.tokens, b) for b in settings.block)
    extent = Extent(
        names=_figures(watch, settings, Partial(asked)).names, layers=watch.layers // experts,
        heads=int(watch.tracker.config["num_attention_heads"]), experts=experts, parts=settings.request.buckets + 1,
        prompts=len(settings.runs), blocks=(rows, columns),
    )  # fmt: skip
    try:
        return Partial.load(path, asked, extent), True
    except GenerationError:
        if not overwrite:
            raise
        return Partial(asked), False


def _loaded(pipe: Any) -> dict[str, Any]:
    """What of a loaded pipeline decides the statistics, beside its configuration."""
    config = pipe.scheduler.config
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        **{f"set of {name} weights": full_fingerprint(part) for name, part in sorted(modules.items())},
        "shift": shift_of(config),
        "scheduler": f"{type(pipe.scheduler).__name__} {digest(plain_config(config))}",
        "boundary_ratio": getattr(pipe, "config", {}).get("boundary_ratio"),
    }


def _look_at_prompts(
    watch: Watch, settings: CalibrationSettings, partial: Partial, path: Path, progress: Progress
) -> None:
    """Generate the prompts that are not done, adding what they show to `partial`."""
    figures = _figures(watch, settings, partial)
    for number, run in enumerate(settings.runs):
        if number < len(partial.calls):
            continue
        phase = f"{number + 1}/{len(settings.runs)} denoise"
        progress(phase, 0, run.steps)

        def step_ends(
            pipe: Any, index: int, timestep: Any, tensors: dict[str, Any], phase: str = phase, steps: int = run.steps
        ) -> dict[str, Any]:
            progress(phase, index + 1, steps)
            return {}

        arguments = {**call_arguments(run), "callback_on_step_end": step_ends}
        partial.calls.append(watch.run(settings.looked_at_of, figures, arguments))
        partial.figures, partial.calls_seen = figures.totals, figures.calls
        assert watch.layout is not None
        partial.text = watch.layout.text
        partial.save(path)


def _figures(watch: Watch, settings: CalibrationSettings, partial: Partial) -> Figures:
    """What is known of the orders so far."""
    sizes = watch.layers, int(watch.tracker.config["num_attention_heads"])
    figures: Figures
    if settings.metric.by == "mass" and settings.density is not None:
        figures = Shares(*sizes, settings.block, settings.density, len(watch.trackers))
    elif settings.metric.by == "mass":
        assert settings.request.mass is not None
        figures = Columns(*sizes, settings.block, settings.request.mass, len(watch.trackers))
    else:
        figures = Figures(*sizes, settings.metric, len(watch.trackers))
    if partial.figures:
        figures.totals, figures.calls = partial.figures, partial.calls_seen
    return figures


def _codes(watch: Watch, settings: CalibrationSettings, partial: Partial) -> torch.Tensor:
    """The order of every head, uint8 [attentions, heads]."""
    figures = _figures(watch, settings, partial)
    return figures.codes if settings.request.reorder else torch.zeros_like(figures.codes)


def _find_maps(
    watch: Watch, settings: CalibrationSettings, partial: Partial, codes: torch.Tensor, path: Path, progress: Progress
) -> None:
    """Make the looked-at calls again, expert by expert and bucket by bucket, and keep the largest blocks of each."""
    request, run = settings.request, settings.runs[0]
    parts, experts = request.buckets + 1, len(watch.trackers)
    layers = watch.layers // experts
    for number in range(len(partial.bits), experts * parts):
        progress("maps", number, experts * parts)
        expert, bucket = divmod(number, parts)
        first = expert * layers
        if expert and not bucket:
            watch.pipe.maybe_free_model_hooks()  # under offloading, the expert before makes room
        sums = MapSums(codes[first : first + layers], run.grid, settings.block, first)
        own = (call for prompt in partial.calls for call in prompt if (call.expert, call.bucket) == (expert, bucket))
        watch.replay(own, sums)
        found = [keep_blocks(x, settings.density, request.mass, run.device) for x in sums.sums]
        partial.counts.append(torch.stack([counts for counts, _, _ in found]))
        partial.bits.append(torch.stack([bits for _, bits, _ in found]))
        partial.recall.append(round(float(torch.stack([recall for _, _, recall in found]).mean()), 6))
        partial.save(path)
    progress("maps", experts * parts, experts * parts)


def keep_blocks(
    sums: torch.Tensor, density: float | None, mass: float | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest blocks of every row, as many in each row of a head.

    Args:
        sums: fp32 [H, M, N], mass of every video block of a layer.
        density: how many: this share of the columns, rounded, at least one; None leaves it to `mass`.
        mass: how many: the fewest that keep this share of a head's sums, at least `LEAST_DENSITY` of the columns.
        device: where to work.

    Returns:
        int32 [H] blocks a row, uint8 [H, M, ceil(N / 8)] bits, fp32 [H] kept share of the sums; on the CPU.
    """
    heads, rows, columns = sums.shape
    sums = sums.to(device)
    if density is not None:
        base = columns_of(density, columns)
        counts = torch.full((heads,), base, dtype=torch.int32, device=device)
    else:
        assert mass is not None
        counts = torch.stack([_fewest(one, mass) for one in sums])
    bits = torch.zeros(1, heads, rows, -(-columns // 8), dtype=torch.uint8, device=device)
    kept = kernels_for("auto", sums).keep_largest(
        sums[None].contiguous(), counts[None].contiguous(), bits, rows, columns
    )
    recall = kept[0].sum(1) / sums.sum((1, 2))
    return counts.cpu(), bits[0].cpu(), recall.cpu()


def _fewest(sums: torch.Tensor, mass: float) -> torch.Tensor:
    """int32: the fewest blocks a row that keep a share of sums [M, N]."""
    least = max(1, int(LEAST_DENSITY * sums.shape[1] + 0.5))
    return columns_for(sums, mass).ceil().nan_to_num(1).clamp(min=least).int()


def _facts(settings: CalibrationSettings, watch: Watch, partial: Partial) -> PlanFacts:
    request, run, metric = settings.request, settings.runs[0], settings.metric
    config, *others = (plain_config(tracker.config) for tracker in watch.trackers)
    return PlanFacts(
        model_class=str(watch.tracker.config["_class_name"]),
        config=config,
        grid=(run.grid.frames, run.grid.height, run.grid.width),
        text=partial.text,
        layers=watch.layers // len(watch.trackers),
        heads=int(watch.tracker.config["num_attention_heads"]),
        block=settings.block,
        buckets=request.buckets,
        density=settings.density,
        mass=request.mass,
        video=(run.num_frames, run.height, run.width),
        method={
            **_judged_by(metric), "steps": run.steps, "guidance": run.guidance,
            "shift": shift_of(watch.pipe.scheduler.config), "seed": request.seed, "dtype": run.dtype,
            "model": run.source.name, "reorder": request.reorder, "calls": sum(partial.calls_seen),
            "recall": partial.recall, "loras": [[lora.name, lora.scale] for lora in run.loras],
        },
        prompts=_hash(request.prompts),
        versions={name: version for name, version in versions().items() if version is not None},
        others=tuple(others),
        weights=tuple(fingerprint(transformer) for transformer in watch.transformers) if others else (),
    )  # fmt: skip


def _judged_by(metric: OrderMetric) -> dict[str, Any]:
    """How orders were chosen, for a plan's metadata; plans of before have no order_by, and chose by the metric."""
    own = {"alpha": metric.alpha, "eps": metric.eps, "sigma": metric.sigma}
    return {"order_by": metric.by, **({} if metric.by == "mass" else own)}


def _hash(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
