"""Binding a processor to a pipeline, following its runs, and undoing it: `sparsify`, `restore`, `RunTracker`."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from videosparse._diffusers import HostProcessor, RunEvents, default_processor
from videosparse.kernels import describe_backend
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models import ModelFamily, family_of
from videosparse.policies.base import LayerPlan, LayerState, Mode, RunStep
from videosparse.processors import LayerProcessor, Processor, Resolved, RunRecord

logger = logging.getLogger(__name__)

_TRACKER = "_videosparse_tracker"
_COMPONENTS = ("transformer", "transformer_2")


class Clock:
    """Which denoising step of which run a pipeline is in: one for all its transformers and branches.

    With a pipeline, the scheduler's `step_index` tells: a host value, None before the first step, the same for all
    branches. Without one, or with a scheduler that lacks it, a changed timestep is a new step, and one that turns
    around, or a run of `num_steps`, a new run; reading it waits for the device.

    Args:
        pipeline: whose `scheduler` to read, or None.
        num_steps: steps of a run as told by the user; None asks the pipeline.
    """

    def __init__(self, pipeline: object | None, num_steps: int | None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._num_steps = num_steps
        self._ended = True
        self._mark: float | None = None
        self._timeline: object = None
        self._rising: bool | None = None
        self._total: int | None = None
        self.run = 0
        self.index = 0

    @property
    def follows(self) -> bool:
        """Whether a scheduler tells the step."""
        return self._scheduler() is not None

    def end(self) -> None:
        """The run is over: whatever comes next belongs to another."""
        self._ended = True

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
        scheduler = getattr(self._alive(), "scheduler", None)
        return scheduler if hasattr(scheduler, "step_index") else None

    def _follow(self, scheduler: Any, timestep: torch.Tensor | None) -> None:
        mark, timeline = scheduler.step_index, scheduler.timesteps
        # set_timesteps makes a new tensor: that also tells a new run from one that failed in its first step
        fresh = self._ended or timeline is not self._timeline
        if fresh or (self._mark is not None and (mark is None or mark < self._mark)):
            self._begin()
            self._total = self._count(timeline, timestep)
        elif mark != self._mark:
            self.index += 1
        self._mark, self._timeline = mark, timeline

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


@dataclass(eq=False)
class _Session:
    """What the transformers of one bound pipeline share."""

    processor: Processor
    clock: Clock
    experts: int
    grid: VideoGrid | None = None

    def enter(self, grid: VideoGrid) -> None:
        """Another grid is another run."""
        if self.grid is not None and grid != self.grid:
            self.clock.end()
        self.grid = grid


class RunTracker:
    """Follows the forwards of one transformer and lays out the plan of every self-attention before each.

    Sits on the root as a forward pre-hook, which offloading leaves alone, outside every compiled region. Owns what a
    method keeps per (context, layer), and frees it when a run ends, another begins, or the grid changes.
    """

    def __init__(self, transformer: Any, family: ModelFamily, session: _Session) -> None:
        self.family, self.session = family, session
        self.config = {**transformer.config, "_class_name": type_name(transformer, family)}
        self.layers: list[tuple[int, LayerProcessor]] = []
        self.states: dict[tuple[str, int], LayerState] = {}
        self.events = RunEvents(self.end_run)
        self._names = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
        self._grid: VideoGrid | None = None
        self._resolved: Resolved | None = None
        self._seen = (0, 0)
        self._calls: dict[str | None, int] = {}
        self._warned = False
        self._handle: Any = None

    def attach(self, transformer: torch.nn.Module) -> None:
        """Put a `LayerProcessor` on every self-attention and start following, in place of what followed before."""
        attentions = self.family.attentions(transformer)
        before = [attention.module.processor for attention in attentions]
        restore(transformer)
        for attention, current in zip(attentions, before, strict=True):
            # not every stock processor can hold the backend that was chosen while ours was there
            replaced = current if isinstance(current, LayerProcessor) else attention.module.processor
            layer = LayerProcessor(self.family, replaced)
            attention.module.processor = layer  # type: ignore[assignment]  # a plain attribute, no submodule
            self.layers.append((attention.depth, layer))
        self.events.install(transformer)
        self._handle = transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        setattr(transformer, _TRACKER, self)

    def detach(self, transformer: torch.nn.Module) -> None:
        """Stop following; the processors are given back by `restore`."""
        self._handle.remove()
        RunEvents.remove(transformer)
        delattr(transformer, _TRACKER)
        self.end_run()

    def end_run(self) -> None:
        """Free what methods keep; the next forward begins a run."""
        self.states.clear()
        self.session.clock.end()

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan the coming forward (a torch forward pre-hook: changes neither args nor kwargs).

        Raises:
            NotImplementedError: a kind of parallelism that sparse attention does not support.
            RuntimeError: training with a method that keeps state.
        """
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        layout = self.family.layout(self.config, inputs)
        resolved = self._resolve(layout.grid)
        training = module.training and torch.is_grad_enabled()
        if training and resolved.policy is not None and not resolved.policy.pure:
            raise RuntimeError(
                f"{type(resolved.policy).__name__} keeps state between steps and cannot be trained with: gradient "
                "checkpointing runs a forward twice. Use RadialProcessor, or call transformer.eval() to generate."
            )
        self.layers[0][1].check_parallel(joint=self.family.joint, sparse=resolved.policy is not None)
        device = inputs["hidden_states"].device
        if training:
            # there is no run: only the layers' part of the schedule has a meaning, and nothing is counted
            schedule = replace(resolved.schedule, first_steps=0, last_steps=0)
            self._plan(layout, RunStep("training", 0), replace(resolved, schedule=schedule), device)
            return
        run = self._now(layout, inputs.get("timestep"), device)
        self._plan(layout, run, resolved, device)
        record = self.session.processor.binding.record
        for _, layer in self.layers:
            if record is not None and layer.plan is not None:
                record.add(layer.plan)

    def _resolve(self, grid: VideoGrid) -> Resolved:
        """The processor's choices for this grid."""
        if self._resolved is None or grid != self._grid:
            session = self.session
            self._resolved = session.processor.resolve(self.config, experts=session.experts, grid=grid)
            session.processor.binding.resolved = self._resolved
            self._grid = grid
        return self._resolved

    def _now(self, layout: TokenLayout, timestep: torch.Tensor | None, device: torch.device) -> RunStep:
        """When this forward happens; starts a record when it is the first of a run."""
        clock, processor = self.session.clock, self.session.processor
        record, before = processor.binding.record, clock.run
        self.session.enter(layout.grid)
        clock.tick(timestep)
        if clock.run != before or record is None:
            assert self._resolved is not None
            record = processor.binding.record = RunRecord(layout, _backend(self._resolved, device))
        record.steps = clock.index + 1
        if clock.run != self._seen[0]:
            self.states.clear()
        if (clock.run, clock.index) != self._seen:
            self._seen, self._calls = (clock.run, clock.index), {}
        return RunStep(self._context(), clock.index, clock.total())

    def _context(self) -> str:
        """Name of the guidance branch, or its number within the step where the pipeline names none."""
        name = self.events.context
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        if name is None:
            return str(calls - 1)
        if calls > 1 and self.session.clock.follows and not self._warned:
            self._warned = True
            logger.warning(
                "The same guidance branch ran twice in one denoising step: the scheduler of the pipeline that "
                "was given to sparsify() does not advance. Call sparsify() on the pipeline that generates."
            )
        return name

    def _plan(self, layout: TokenLayout, run: RunStep, resolved: Resolved, device: torch.device) -> None:
        """Give every layer its plan; dense layers share one."""
        depths = 1 + max(depth for depth, _ in self.layers)
        dense = LayerPlan(Mode.DENSE, layout)
        # the option is about sparse calls, but who asks for "torch" wants none of our kernels
        fast = resolved.options.backend != "torch" and describe_backend(device)[0] == "triton"
        for number, (depth, layer) in enumerate(self.layers):
            layer.own_dense = fast and not layer.backend_chosen()
            if resolved.policy is None or resolved.schedule.is_dense(run, depth, depths):
                layer.plan = dense
                continue
            state = self.states.setdefault((run.context, number), {})
            plan = resolved.policy.plan(layout, run, number, state, device=device)
            layer.plan = replace(plan, options=resolved.options)


def _backend(resolved: Resolved, device: torch.device) -> str:
    if resolved.policy is None:
        return "none"
    return describe_backend(device)[0] if resolved.options.backend == "auto" else resolved.options.backend


def type_name(transformer: object, family: ModelFamily) -> str:
    """The class name by which a family knows a transformer: sharding wrappers put a subclass in front."""
    return next(cls.__name__ for cls in type(transformer).__mro__ if cls.__name__ in family.transformers)


def sparsify(pipe_or_transformer: object, processor: Processor) -> None:
    """Bind `processor` to every self-attention of a pipeline or a transformer. Attaching again replaces.

    Args:
        pipe_or_transformer: a Diffusers pipeline of a supported family, or its transformer. A transformer alone does
            not know how many steps a run has: give `num_steps`, or steps as ints.
        processor: e.g. `RadialProcessor()`.

    Raises:
        TypeError: not a supported pipeline or transformer, not one of our processors, or an attention already has a
            processor that is neither stock nor ours.
        ValueError: the processor is bound to another pipeline, or asks for what this model does not have.
        NotImplementedError: ring parallelism.
    """
    if not isinstance(processor, Processor):
        raise TypeError(
            f"processor must be a RadialProcessor(...) or another processor of videosparse (got {processor!r}); stock "
            "processors go to transformer.set_attn_processor."
        )
    pipeline, transformers = _targets(pipe_or_transformer)
    _check_free(processor, transformers)
    session = _Session(processor, Clock(pipeline, processor.num_steps), _experts(pipeline))
    trackers = [RunTracker(t, family_of(t), session) for t in transformers]
    # everything that can be wrong is found out before anything changes
    resolved = [
        _check_model(t, tracker, alone=pipeline is None) for t, tracker in zip(transformers, trackers, strict=True)
    ]
    for transformer, tracker in zip(transformers, trackers, strict=True):
        tracker.attach(transformer)
    sizes = (
        f"{type(t).__name__}, {len(tracker.layers)} layers" for t, tracker in zip(transformers, trackers, strict=True)
    )
    processor.binding.bind(transformers, " + ".join(sizes), resolved[0])


def restore(pipe_or_transformer: object) -> None:
    """Give every attention its stock processor back and remove the hooks. Repeatable; nothing bound is no error.

    Raises:
        TypeError: not a supported pipeline or transformer.
    """
    for transformer in _targets(pipe_or_transformer)[1]:
        family = family_of(transformer)
        tracker = vars(transformer).get(_TRACKER)
        if tracker is not None:
            tracker.detach(transformer)
            tracker.session.processor.binding.release(transformer)
        ours = {id(attention.module) for attention in family.attentions(transformer)}
        for module in transformer.modules():
            current = getattr(module, "processor", None)
            if isinstance(current, LayerProcessor):
                module.processor = current.give_back()
            elif isinstance(current, Processor):
                # put there by transformer.set_attn_processor, on every attention alike
                stock = family.stock[0] if id(module) in ours else "AttnProcessor2_0"
                module.processor = default_processor(module, stock)


def set_attn_processor(pipe: object, processor: object) -> None:
    """What `pipe.set_attn_processor` does once videosparse is imported.

    Args:
        pipe: a Diffusers pipeline.
        processor: one of our processors, which `sparsify` then binds; or what a transformer's own
            `set_attn_processor` takes, a stock processor or a dict of them, which is passed on to every transformer
            of the pipeline after `restore`.

    Raises:
        TypeError: see `sparsify`; or the transformer has no `set_attn_processor` to pass a stock processor to.
    """
    if isinstance(processor, Processor):
        sparsify(pipe, processor)
        return
    for transformer in _targets(pipe)[1]:
        accept = getattr(transformer, "set_attn_processor", None)
        if accept is None:
            raise TypeError(
                f"{type(transformer).__name__} takes no stock processors (it has no set_attn_processor); "
                "videosparse.restore(pipe) gives it back its own."
            )
        if vars(transformer).get(_TRACKER) is not None:
            restore(transformer)
        # a transformer empties the dict that it is given
        accept(dict(processor) if isinstance(processor, Mapping) else processor)


def _targets(pipe_or_transformer: object) -> tuple[object | None, list[torch.nn.Module]]:
    """(pipeline or None, its transformers), wrappers of torch.compile removed."""
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return None, [_unwrap(pipe_or_transformer)]
    parts = (getattr(pipe_or_transformer, name, None) for name in _COMPONENTS)
    transformers = [_unwrap(part) for part in parts if isinstance(part, torch.nn.Module)]
    if not transformers:
        raise TypeError(
            "Expected a Diffusers pipeline with a transformer, or a transformer "
            f"(got {type(pipe_or_transformer).__name__})."
        )
    return pipe_or_transformer, transformers


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, torch.nn.Module) else module


def _experts(pipeline: object | None) -> int:
    """2 for a pipeline of two noise-level experts, also while only one of them is loaded."""
    config = getattr(pipeline, "config", {})
    return 2 if getattr(pipeline, "transformer_2", None) is not None or config.get("boundary_ratio") else 1


def _check_free(processor: Processor, transformers: list[torch.nn.Module]) -> None:
    others = [t for t in processor.binding.alive() if not any(t is mine for mine in transformers)]
    if others:
        raise ValueError(
            f"This {type(processor).__name__} is bound to another {type(others[0]).__name__}; make a second one, or "
            "call videosparse.restore(...) on that pipeline first."
        )


def _check_model(transformer: torch.nn.Module, tracker: RunTracker, *, alone: bool) -> Resolved:
    """What the processor chooses for a transformer; raises where the two do not go together."""
    family, session = tracker.family, tracker.session
    attentions = family.attentions(transformer)
    for attention in attentions:
        current = attention.module.processor
        stock = current.stock if isinstance(current, LayerProcessor) else current
        if type(stock).__name__ not in family.stock and not isinstance(stock, Processor):
            raise TypeError(
                f"{attention.name} has a {type(stock).__name__}; only the stock {family.stock[0]} can be replaced "
                "without losing what it does. Give the attention its stock processor first."
            )
    resolved = session.processor.resolve(tracker.config, experts=session.experts)
    resolved.schedule.check_layers(1 + max(a.depth for a in attentions))
    if alone:
        resolved.schedule.dense_steps(session.processor.num_steps)
    host = HostProcessor(attentions[0].module.processor)
    host.check_parallel(joint=family.joint, sparse=resolved.policy is not None)
    return resolved
