"""Binding a processor to a pipeline, following its runs, and undoing it: `sparsify`, `restore`, `RunTracker`."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from videosparse._diffusers import FailureEvents, HostProcessor, RunEvents, default_processor, is_parallel
from videosparse.blocks import BlockIndex, PackedIndex
from videosparse.clock import Clock
from videosparse.components import experts_of, is_compiled, number_of, targets, unwrapped
from videosparse.dense_plans import dense_plan, title
from videosparse.kernels import describe_backend
from videosparse.kernels.options import own_backend
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models import ModelFamily, family_of
from videosparse.models.rope import undo
from videosparse.ordering import TokenOrder
from videosparse.policies.base import (
    TRAINING,
    DenseSchedule,
    LayerPlan,
    LayerState,
    Mode,
    RunStep,
    SparsityPolicy,
)
from videosparse.processors import DensePlan, LayerProcessor, Processor, Resolved
from videosparse.remarks import say_if_left_alone, warn_if_all_dense, warn_if_unlike
from videosparse.report import RunRecord
from videosparse.sharing import Shard, check_shared, shard_of
from videosparse.windows import current_window

logger = logging.getLogger(__name__)

_TRACKER = "_videosparse_tracker"


@dataclass(eq=False)
class _Session:
    """What the transformers of one bound pipeline share."""

    processor: Processor
    clock: Clock
    experts: int
    grid: VideoGrid | None = None
    active: RunTracker | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Session:
        # a copy is in no run; by way of `active` the other expert's tracker would be copied before its transformer
        twin = memo[id(self)] = copy.copy(self)
        twin.processor, twin.clock = copy.deepcopy((self.processor, self.clock), memo)
        twin.active = None
        return twin

    def enter(self, tracker: RunTracker, grid: VideoGrid, policy: SparsityPolicy | None) -> None:
        """Another grid is another run; another expert needs nothing of what the one before has kept.

        Raises:
            RuntimeError: the grid changes in the middle of a run whose maps were searched for on another.
        """
        if self.grid is not None and grid != self.grid:
            if policy is not None and policy.searches and self.clock.continues():
                raise RuntimeError(
                    f"The token grid changed from {self.grid} to {grid} in the middle of a run, and the maps of "
                    f"{type(policy).__name__} belong to the grid that was searched. Generate each size in a run of its "
                    "own, or use RadialProcessor()."
                )
            self.clock.end()
        if self.active is not None and self.active is not tracker:
            self.active.free()
        self.grid, self.active = grid, tracker

    def fail(self) -> None:
        """A run has ended by an exception: free what it has kept."""
        if self.active is not None:
            self.active.end_run()


class RunTracker:
    """Follows the forwards of one transformer and lays out the plan of every self-attention before each.

    Sits on the root as a forward pre-hook, which offloading leaves alone, outside every compiled region. Owns what a
    method keeps per (context, layer), and frees it when a run ends, another begins, the grid changes, or the other
    expert takes over.
    """

    def __init__(self, transformer: Any, family: ModelFamily, session: _Session, expert: int = 0) -> None:
        self.family, self.session, self.expert = family, session, expert
        self.config = {**transformer.config, "_class_name": type_name(transformer, family)}
        self.layers: list[tuple[int, LayerProcessor]] = []
        self.states: dict[tuple[str, int], LayerState] = {}
        self.events = RunEvents(self.end_run)
        # set by who trains: forwards are no steps of a run, with gradients or without (held-out losses), and the noise
        # level says which of them are dense
        self.outside_run = False
        self.all_dense = False
        self._names = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
        self._grid: VideoGrid | None = None
        self._resolved: Resolved | None = None
        self._seen = (0, 0)
        self._ranks = 1
        self._dealt: WeakKeyDictionary[PackedIndex, tuple[PackedIndex, TokenOrder, Shard]] = WeakKeyDictionary()
        self._searching: list[tuple[tuple[str, int], LayerProcessor, LayerState]] = []
        self._calls: dict[tuple[str | None, int | None], int] = {}
        self._warned = False
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> RunTracker:
        twin = memo[id(self)] = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        binding = self.session.processor.binding
        for transformer in binding.alive():
            if vars(transformer).get(_TRACKER) is self and id(transformer) in memo:
                twin.session.processor.binding.join(memo[id(transformer)], binding.resolved)
        return twin

    def attach(self, transformer: torch.nn.Module) -> None:
        """Put a `LayerProcessor` on every self-attention and start following, in place of what followed before."""
        attentions = self.family.attentions(transformer)
        before = [attention.module.processor for attention in attentions]
        _give_back(transformer)
        for attention, current in zip(attentions, before, strict=True):
            # not every stock processor can hold the backend that was chosen while ours was there
            replaced = current if isinstance(current, LayerProcessor) else attention.module.processor
            layer = LayerProcessor(self.family, replaced)
            attention.module.processor = layer  # type: ignore[assignment]  # a plain attribute, no submodule
            self.layers.append((attention.depth, layer))
        self.events.install(transformer)
        self._handles = [
            transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            transformer.register_forward_hook(self.after_forward, always_call=True),
        ]
        setattr(transformer, _TRACKER, self)

    def detach(self, transformer: torch.nn.Module) -> None:
        """Stop following; the processors are given back by `restore`."""
        for handle in self._handles:
            handle.remove()
        RunEvents.remove(transformer)
        delattr(transformer, _TRACKER)
        self.end_run()

    def end_run(self) -> None:
        """Free what the run has kept; the next forward begins another."""
        self.free()
        self.session.clock.end()

    def free(self) -> None:
        """Let go of states and plans."""
        self.states.clear()
        self._searching.clear()
        for _, layer in self.layers:
            layer.plan = None

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan the coming forward (a torch forward pre-hook: changes neither args nor kwargs).

        Raises:
            NotImplementedError: a kind of parallelism that sparse attention does not support.
            RuntimeError: training with a method that keeps state; another grid in the middle of a run that searches.
            ValueError: inference with steps given as fractions, or last steps, where nobody says how many there are.
        """
        self._settle()
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        layout = self.family.layout(self.config, inputs)
        resolved = self._resolve(layout.grid)
        if self.all_dense:
            resolved = replace(resolved, policy=None)
        training = self.outside_run or _training(module)
        if training and resolved.policy is not None and not resolved.policy.pure:
            raise RuntimeError(
                f"{type(resolved.policy).__name__} keeps state between steps and cannot be trained with: gradient "
                "checkpointing runs a forward twice. Use RadialProcessor; to generate, call the transformer under "
                "torch.no_grad(), as pipelines do."
            )
        if training and resolved.options.fused_norm == "auto":
            # a checkpoint that runs without gradients first must round as it does when it runs again
            resolved = replace(resolved, options=replace(resolved.options, fused_norm="off"))
        self._share(layout, resolved, training)
        device = inputs["hidden_states"].device
        hosts = [layer for _, layer in self.layers]
        dense = dense_plan(hosts, layout, resolved, inputs["hidden_states"], int(self.config["attention_head_dim"]))
        if training:
            # there is no run: only the layers' part of the schedule has a meaning, and nothing is counted
            schedule = replace(resolved.schedule, first_steps=0, last_steps=0)
            moment = RunStep(TRAINING, 0, expert=self.expert)
            self._plan(dense, moment, replace(resolved, schedule=schedule), inputs["hidden_states"])
            return
        run = self._now(dense, inputs.get("timestep"), device, current_window(module))
        if resolved.policy is not None:
            resolved.policy.check_run(resolved.schedule, run.total)
        self._plan(dense, run, resolved, inputs["hidden_states"])
        if any(layer.plan is not None and layer.plan.offloaded for _, layer in self.layers):
            _check_not_compiled(module)
        record = self.session.processor.binding.record
        for _, layer in self.layers:
            if record is not None and layer.plan is not None:
                record.add(layer.plan)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Make a backward pass begin by giving every layer the plan of its forward (a torch forward hook).

        Gradient checkpointing runs layers again during backward, and other forwards may have been planned since. The
        gradient of the output comes before that of any block, and forwards go through backward one after another. This
        serves compiled blocks, too; a loss on hidden states alone, which never gets here, is what
        `LayerProcessor._planned` is for.

        Called without an output when the forward has failed: that was the end of the run.
        """
        if output is None:
            self.end_run()
            return
        if not torch.is_grad_enabled():
            return
        plans = [(layer, layer.plan) for _, layer in self.layers]

        def recall(gradient: torch.Tensor) -> None:
            for layer, plan in plans:
                layer.plan = plan

        for tensor in output.values() if isinstance(output, Mapping) else output:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(recall)  # type: ignore[no-untyped-call]

    def _share(self, layout: TokenLayout, resolved: Resolved, training: bool) -> None:
        """Tell the layers what this rank holds of the sequence, where ranks share it."""
        host, joint = self.layers[0][1], self.family.joint
        heads = int(self.config["num_attention_heads"])
        check_shared(host, joint=joint, policy=resolved.policy, heads=heads, training=training)
        shard = shard_of(host, layout, resolved.options)
        self._ranks = 1 if shard is None else shard.exchange.ranks
        for _, layer in self.layers:
            layer.shard = shard

    def _resolve(self, grid: VideoGrid) -> Resolved:
        """The processor's choices for this grid."""
        if self._resolved is None or grid != self._grid:
            session = self.session
            self._resolved = session.processor.resolve(self.config, experts=session.experts, grid=grid)
            session.processor.binding.resolved = self._resolved
            self._grid = grid
            say_if_left_alone(self._resolved, grid)
        return self._resolved

    def _now(
        self, dense: DensePlan, timestep: torch.Tensor | None, device: torch.device, window: int | None
    ) -> RunStep:
        """When this forward happens; starts a record when it is the first of a run."""
        clock, binding = self.session.clock, self.session.processor.binding
        before = clock.run
        assert self._resolved is not None
        self.session.enter(self, dense.layout.grid, self._resolved.policy)
        clock.tick(timestep)
        if clock.run != before or binding.record is None:
            warn_if_all_dense(self._resolved, clock.total())
            warn_if_unlike(self._resolved, clock.shift())
            runs_dense = self.layers[0][1].backend_name() if dense.kernel is None else title(dense, device)
            runs_sparse = _backend(self._resolved, device)
            binding.record = RunRecord(dense.layout, runs_sparse, runs_dense, self._resolved.options.quant)
        binding.record.steps = clock.index + 1
        if clock.run != self._seen[0]:
            self.free()
        if (clock.run, clock.index) != self._seen:
            self._seen, self._calls = (clock.run, clock.index), {}
        context = self._context(window)
        if window is not None:
            context = f"{context}, window {window}"
        return RunStep(context, clock.index, clock.total(), self.expert, clock.part(self.expert))

    def _context(self, window: int | None) -> str:
        """Name of the guidance branch, or its number within the step where the pipeline names none."""
        name = self.events.context
        calls = self._calls[name, window] = self._calls.get((name, window), 0) + 1
        if name is None:
            return str(calls - 1)
        if calls > 1 and self.session.clock.follows and not self._warned:
            self._warned = True
            logger.warning(
                "The same guidance branch ran twice in one denoising step: the scheduler of the pipeline that "
                "was given to sparsify() does not advance. Call sparsify() on the pipeline that generates."
            )
        return name

    def _settle(self) -> None:
        """Bring back the states of layers that were to search in the forward before, and were not called.

        Step caches skip layers. Nothing was written then, so the next forward has to plan the search again.
        """
        for key, layer, before in self._searching:
            if not layer.searched and key in self.states:
                self.states[key] = before
        self._searching.clear()

    def _plan(self, dense: DensePlan, run: RunStep, resolved: Resolved, latents: torch.Tensor) -> None:
        """Give every layer its plan; layers with the same map share one."""
        depths = 1 + max(depth for depth, _ in self.layers)
        shared: dict[tuple[int, int], LayerPlan] = {}
        for number, (depth, layer) in enumerate(self.layers):
            layer.plan = dense
            known = bool(self.states.get((run.context, number)))
            if resolved.policy is None or not _is_asked(resolved.policy, resolved.schedule, run, depth, depths, known):
                continue
            plan = self._ask(resolved.policy, dense.layout, run, number, latents)
            if plan.mode is Mode.DENSE:
                continue
            plan = self._own(plan, layer)
            # only sparse plans are alike when their maps are: the others keep what belongs to one layer
            key = (id(plan.index), id(plan.order)) if plan.mode is Mode.SPARSE else (id(layer), 0)
            if key not in shared:
                shared[key] = replace(plan, options=resolved.options)
                own = _own_backend(resolved, latents.device) == "triton"
                if torch.is_grad_enabled() and isinstance(plan.index, BlockIndex) and own:
                    plan.index.prepare_backward()  # here, outside the graphs that compiled blocks are
                if plan.order is not None:
                    plan.order.table(latents.device)  # likewise
            layer.plan = shared[key]

    def _own(self, plan: LayerPlan, layer: LayerProcessor) -> LayerPlan:
        """The plan of this rank's heads, where it was made for all of them."""
        index, order, shard = plan.index, plan.order, layer.shard
        if shard is None or not isinstance(index, PackedIndex) or not isinstance(order, TokenOrder):
            return plan  # shared by all heads, or found for these
        if index not in self._dealt:
            self._dealt[index] = shard.deal(index, order)
        index, order, layer.shard = self._dealt[index]
        return replace(plan, index=index, order=order)

    def _ask(
        self, policy: SparsityPolicy, layout: TokenLayout, run: RunStep, number: int, latents: torch.Tensor
    ) -> LayerPlan:
        """What a method decides for one layer; remembers the state before, where that was to search."""
        key = (run.context, number)
        state = self.states.setdefault(key, {})
        before = dict(state)
        plan = policy.plan(
            layout, run, number, state,
            device=latents.device, samples=latents.shape[0],
            heads=int(self.config["num_attention_heads"]) // (self._ranks if policy.searches else 1),
        )  # fmt: skip
        if plan.mode in (Mode.SEARCH, Mode.REFRESH):
            layer = self.layers[number][1]
            layer.searched = False
            self._searching.append((key, layer, before))
        return plan


def _is_asked(
    policy: SparsityPolicy, schedule: DenseSchedule, run: RunStep, layer: int, layers: int, known: bool
) -> bool:
    """Whether a method decides what a layer does: at sparse steps, and at the dense one that searches.

    A search in the last sparse step would be for nobody: a layer of which nothing is `known` by then stays dense.
    """
    if not schedule.is_dense(run, layer, layers):
        return known or not (policy.searches and run.context != TRAINING and schedule.is_last_sparse(run))
    return policy.searches and schedule.searches_at(run, layer, layers)


def _check_not_compiled(transformer: torch.nn.Module) -> None:
    """Raise RuntimeError where blocks are compiled, in which state cannot be offloaded."""
    if any(is_compiled(module) for module in transformer.modules()):
        raise RuntimeError(
            "offload_state=True copies maps between calls and does not work in compiled blocks; drop it, or do not "
            "compile the transformer (lse_dtype='bfloat16' halves what is kept)."
        )


def _training(transformer: torch.nn.Module) -> bool:
    """Whether a forward serves training, which has no run: no step to be dense at, nothing to count."""
    if not torch.is_grad_enabled():
        return False
    return transformer.training or any(parameter.requires_grad for parameter in transformer.parameters())


def _backend(resolved: Resolved, device: torch.device) -> str:
    if resolved.policy is None:
        return "none"
    return describe_backend(device)[0] if resolved.options.backend == "auto" else resolved.options.backend


def _own_backend(resolved: Resolved, device: torch.device) -> str:
    """What computes gradients: libraries of attention replace our forward only."""
    backend = own_backend(resolved.options.backend)
    return describe_backend(device)[0] if backend == "auto" else backend


def type_name(transformer: object, family: ModelFamily) -> str:
    """The class name by which a family knows a transformer: sharding wrappers put a subclass in front."""
    return next(cls.__name__ for cls in type(transformer).__mro__ if cls.__name__ in family.transformers)


def tracker_of(transformer: torch.nn.Module) -> RunTracker:
    """What follows the forwards of a transformer to which a processor is bound.

    Raises:
        KeyError: none is.
    """
    tracker: RunTracker = vars(unwrapped(transformer))[_TRACKER]
    return tracker


def sparsify(pipe_or_transformer: object, processor: Processor, *, place: tuple[int, int] | None = None) -> None:
    """Bind `processor` to every self-attention of a pipeline or a transformer. Attaching again replaces.

    Args:
        pipe_or_transformer: a Diffusers pipeline of a supported family, or its transformer. A transformer alone does
            not know how many steps a run has: to generate with it, give `num_steps`, or steps as ints.
        processor: e.g. `RadialProcessor()`.
        place: for one transformer of several that share a run, given alone (to train it): (its number from 0, how
            many they are). A pipeline knows.

    Raises:
        TypeError: not a supported pipeline or transformer, not one of our processors, or an attention already has a
            processor that is neither stock nor ours.
        ValueError: the processor is bound to another pipeline, or asks for what this model does not have.
        NotImplementedError: ring parallelism, or a transformer that `device_map` splits over several devices.
    """
    if not isinstance(processor, Processor):
        raise TypeError(
            f"processor must be a RadialProcessor(...) or another processor of videosparse (got {processor!r}); stock "
            "processors go to transformer.set_attn_processor."
        )
    pipeline, transformers = targets(pipe_or_transformer)
    _check_free(processor, transformers)
    experts = experts_of(pipeline) if place is None else place[1]
    session = _Session(processor, Clock(pipeline, processor.num_steps), experts)
    numbers = [number_of(pipeline, t) if place is None else place[0] for t in transformers]
    trackers = [RunTracker(t, family_of(t), session, n) for t, n in zip(transformers, numbers, strict=True)]
    # everything that can be wrong is found out before anything changes
    resolved = [_check_model(t, tracker) for t, tracker in zip(transformers, trackers, strict=True)]
    for transformer, tracker in zip(transformers, trackers, strict=True):
        tracker.attach(transformer)
    if pipeline is not None:
        FailureEvents.install(pipeline, session.fail)
    sizes = (
        f"{type(t).__name__}, {len(tracker.layers)} layers" for t, tracker in zip(transformers, trackers, strict=True)
    )
    processor.binding.bind(transformers, " + ".join(sizes), resolved[0])


def restore(pipe_or_transformer: object) -> None:
    """Give every attention its stock processor back and undo `extend_rope`. Repeatable; nothing bound is no error.

    What `parallelize` split stays split, and the log says so where stock processors cannot run on it.

    Raises:
        TypeError: not a supported pipeline or transformer.
    """
    pipeline, transformers = targets(pipe_or_transformer)
    if pipeline is not None:
        FailureEvents.remove(pipeline)
    for transformer in transformers:
        _give_back(transformer)
        undo(transformer)
        if is_parallel(transformer) and family_of(transformer).joint:
            logger.warning(
                "%s stays shared by ranks, and its stock processors cannot run so: give it a processor of videosparse "
                "(DenseProcessor for dense), or load it anew.", type(transformer).__name__,
            )  # fmt: skip


def _give_back(transformer: torch.nn.Module) -> None:
    """Give every attention of one transformer its stock processor back and stop following it."""
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
            of the pipeline once ours are off. A stretched rotary embedding stays until `restore`.

    Raises:
        TypeError: see `sparsify`; or the transformer has no `set_attn_processor` to pass a stock processor to.
    """
    if isinstance(processor, Processor):
        sparsify(pipe, processor)
        return
    FailureEvents.remove(pipe)
    for transformer in targets(pipe)[1]:
        accept = getattr(transformer, "set_attn_processor", None)
        if accept is None:
            raise TypeError(
                f"{type(transformer).__name__} takes no stock processors (it has no set_attn_processor); "
                "videosparse.restore(pipe) gives it back its own."
            )
        if vars(transformer).get(_TRACKER) is not None:
            _give_back(transformer)
        # a transformer empties the dict that it is given
        accept(dict(processor) if isinstance(processor, Mapping) else processor)


def _check_free(processor: Processor, transformers: list[torch.nn.Module]) -> None:
    others = [t for t in processor.binding.alive() if not any(t is mine for mine in transformers)]
    if others:
        raise ValueError(
            f"This {type(processor).__name__} is bound to another {type(others[0]).__name__}; make a second one, or "
            "call videosparse.restore(...) on that pipeline first."
        )


def _check_one_device(transformer: torch.nn.Module) -> None:
    """Raise NotImplementedError when a device map spreads a transformer over accelerators."""
    placed = getattr(transformer, "hf_device_map", None) or {}
    devices = sorted({str(device) for device in placed.values()} - {"cpu", "disk"})
    if len(devices) > 1:
        raise NotImplementedError(
            f"{type(transformer).__name__} is split over devices {', '.join(devices)} by device_map, and block maps "
            "live on one. Load it on one device; if it does not fit, use pipe.enable_model_cpu_offload() or "
            "transformer.enable_group_offload(...)."
        )


def _check_model(transformer: torch.nn.Module, tracker: RunTracker) -> Resolved:
    """What the processor chooses for a transformer; raises where the two do not go together."""
    family, session = tracker.family, tracker.session
    _check_one_device(transformer)
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
    session.processor.check_transformer(transformer, tracker.config, tracker.expert)
    resolved.schedule.check_layers(1 + max(a.depth for a in attentions))
    host, heads = HostProcessor(attentions[0].module.processor), int(tracker.config["num_attention_heads"])
    check_shared(host, joint=family.joint, policy=resolved.policy, heads=heads)
    if family.joint and resolved.policy is not None and resolved.options.backend == "fa4":
        raise ValueError(
            f'backend="fa4" cannot mask text padding, nor the gap before text, which {type_name(transformer, family)} '
            'has in its self-attention; use "auto" or "flex".'
        )
    return resolved
