"""What a user hands to `set_attn_processor`, and what then sits in every self-attention."""

from __future__ import annotations

import copy
import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from videosparse._diffusers import HostProcessor
from videosparse.blocks import PackedIndex
from videosparse.cases import ModelSpec
from videosparse.defaults import RadialDefaults, block_for, radial_defaults
from videosparse.kernels import KernelOptions, attend
from videosparse.kernels.dense import OWN, dense_by_library
from videosparse.kernels.selection import expand
from videosparse.layout import VideoGrid
from videosparse.logits import FarLogits
from videosparse.models import ModelFamily, Rotary, model_variant
from videosparse.policies.adaspa import AdaSpaPolicy
from videosparse.policies.base import DenseSchedule, LayerPlan, Mode, SparsityPolicy
from videosparse.policies.paro import PAROPolicy
from videosparse.policies.paro_plan import PAROPlan
from videosparse.policies.radial import RadialPolicy
from videosparse.report import RunRecord, RunReport
from videosparse.searching import brought, refresh, search, take_back
from videosparse.sharing import Shard, arrived

_NOTED = "_videosparse_plans"  # attribute of a rotary embedding: the plans of its forward, by layer


@dataclass(frozen=True, eq=False)
class DensePlan(LayerPlan):
    """A dense call, and what runs it; shared by all dense layers of a forward.

    Args:
        key_mask: bool [B, L], the valid keys for Diffusers' backend; None where all are valid.
        kernel: what to take instead of Diffusers' backend: our kernel (`dense.OWN`), which reads text lengths from the
            layout, or a library (see `DENSE_KERNELS`), which reads none; None takes the backend.
    """

    key_mask: torch.Tensor | None = None
    kernel: str | None = None


class LayerProcessor(HostProcessor):
    """The processor of one self-attention: does what its current plan says.

    Args:
        family: how the model projects and finishes.
        replaced: the processor it stands in for.

    Attributes:
        plan: what to do in the next call; set before every forward of the transformer, from outside any graph.
        searched: whether a call has written what its plan was to search for; a step cache may skip this layer.
        shard: the part of the sequence that this rank holds; None where it holds all.
    """

    def __init__(self, family: ModelFamily, replaced: Any) -> None:
        super().__init__(replaced)
        self.family = family
        self.plan: LayerPlan | None = None
        self.searched = False
        self.shard: Shard | None = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Self-attention from hidden states to hidden states.

        Diffusers passes only parameters that are named here: Wan calls its rotary embedding `rotary_emb`, the others
        `image_rotary_emb`. `attention_mask` is not read: the plan's layout knows which text is padding.

        Raises:
            RuntimeError: called before the transformer's own forward has made a plan.
        """
        rotary = rotary_emb if image_rotary_emb is None else image_rotary_emb
        plan, shard = self._planned(rotary), self.shard
        # a rank projects its part of the video, in raster order and without a gap
        local = plan if shard is None else shard.plan
        q, k, v = self.family.project(attn, hidden_states, encoder_hidden_states, rotary, local)
        q, k, v = autocast(q), autocast(k), autocast(v)
        if shard is None:
            out = self.core(q, k, v, plan)
        else:
            q, k, v = map(arrived, [shard.whole(x, plan) for x in (q, k, v)])  # all are sent before one is waited for
            out = shard.part(self.core(q, k, v, plan), plan)
        return self.family.finish(attn, out.to(q.dtype), local)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """Attention output [B, L, H, D] of q, k, v [B, L, H, D], L = plan.layout.length."""
        if isinstance(plan, DensePlan):
            if plan.kernel is None:
                return self.dense(q, k, v, plan.key_mask)
            return _attend(plan, q, k, v) if plan.kernel == OWN else dense_by_library(q, k, v, plan.kernel)
        if plan.offloaded:
            here = brought(plan, q.device)
            out = self.core(q, k, v, here)
            take_back(plan, here)
            return out
        if plan.mode is Mode.SEARCH:
            out = search(plan, q, k, v)
            self.searched = True
            return out
        if plan.mode is Mode.REFRESH:
            refresh(plan, q, k)
            self.searched = True
        return _attend(plan, q, k, v)

    def _planned(self, rotary: Rotary | None) -> LayerPlan:
        """The plan of the forward that this call belongs to.

        Gradient checkpointing calls layers again during backward, when other forwards may have been planned in the
        meantime. It hands them the very rotary embedding of their own forward, so plans are noted there. Where that is
        not so (in a compiled graph, or when a wrapper copies inputs), see `RunTracker.after_forward`.
        """
        plan = self.plan
        if not torch.compiler.is_compiling() and rotary is not None:
            noted: dict[LayerProcessor, LayerPlan | None] = vars(rotary[0]).setdefault(_NOTED, {})
            if torch._C._current_graph_task_id() != -1:  # inside backward
                plan = noted.get(self, plan)
            else:
                noted[self] = plan
        if plan is None:
            raise RuntimeError("There is no plan yet: call the transformer itself, not one of its blocks.")
        return plan


def autocast(x: torch.Tensor) -> torch.Tensor:
    """What autocast does to the inputs of an attention: norms and rotary embeddings leave q and k wider than v."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _attend(plan: LayerPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    index = plan.index
    if isinstance(index, PackedIndex):
        index = expand(index, plan.options.backend)
    out: torch.Tensor = attend(q, k, v, layout=plan.layout, index=index, order=plan.order, options=plan.options)
    return out


@dataclass(frozen=True)
class Resolved:
    """A processor's choices for one model.

    Args:
        variant: which published model's settings were taken, e.g. "wan2.1".
        policy: the method; None is dense everywhere.
        schedule: where attention stays dense nevertheless.
        options: how kernels run.
    """

    variant: str
    policy: SparsityPolicy | None
    schedule: DenseSchedule
    options: KernelOptions


@dataclass(eq=False)
class _Binding:
    """What a processor remembers of the pipeline that it is bound to."""

    transformers: list[weakref.ref[torch.nn.Module]] = field(default_factory=list)
    model: str = ""
    resolved: Resolved | None = None
    record: RunRecord | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Binding:
        # copies of transformers join as they are made: where there are two, the first is made before the second
        return _Binding(model=self.model, record=copy.deepcopy(self.record, memo))

    def alive(self) -> list[torch.nn.Module]:
        return [t for t in (ref() for ref in self.transformers) if t is not None]

    def bind(self, transformers: list[torch.nn.Module], model: str, resolved: Resolved) -> None:
        self.transformers = [weakref.ref(t) for t in transformers]
        self.model, self.resolved, self.record = model, resolved, None

    def join(self, transformer: torch.nn.Module, resolved: Resolved | None) -> None:
        """Bind one more, for which these are the choices."""
        self.transformers.append(weakref.ref(transformer))
        self.resolved = resolved

    def release(self, transformer: torch.nn.Module) -> None:
        """Unbind one; the report of the last run stays."""
        self.transformers = [weakref.ref(t) for t in self.alive() if t is not transformer]
        self.resolved = self.resolved if self.transformers else None


@dataclass(frozen=True, eq=False, repr=False)
class Processor(ABC):
    """A method with its schedule and options, for all self-attentions of one pipeline.

    Hand it to `pipe.set_attn_processor` or `videosparse.sparsify`. One object serves one pipeline at a time; both
    transformers of Wan2.2-A14B count as one.
    """

    binding: _Binding = field(default_factory=_Binding, init=False)

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of a run as told by the user, None to ask the pipeline."""
        return None

    @abstractmethod
    def resolve(
        self, model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
    ) -> Resolved:
        """The choices for a model: what was asked, and defaults for the rest. Needs no weights.

        Args:
            model: a `ModelSpec`, or a transformer's configuration with its `_class_name`.
            experts: transformers that share a run: 2 for Wan2.2-A14B.
            grid: token grid of the video, where known: small frames default to smaller blocks.

        Raises:
            ValueError: the configuration is of an unknown transformer.
        """

    def check_transformer(  # noqa: B027  most methods fit every transformer that they can be resolved for
        self, transformer: torch.nn.Module, config: Mapping[str, Any], expert: int
    ) -> None:
        """Raise ValueError at binding where the method does not fit a transformer, number `expert` of its pipeline."""

    def report(self) -> RunReport:
        """What the last run did, or the current one has done so far.

        Raises:
            RuntimeError: nothing has run with this processor yet.
        """
        if self.binding.record is None:
            raise RuntimeError(f"{type(self).__name__} has no run to report on: bind it to a pipeline and generate.")
        return self.binding.record.report()

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Always raises RuntimeError: reached only when a transformer was given this object directly."""
        name = type(self).__name__
        raise RuntimeError(
            f"This {name} sits in a transformer but is bound to no pipeline: transformer.set_attn_processor puts one "
            "object on every attention, cross-attention included. Call pipe.set_attn_processor(...), or "
            f"videosparse.sparsify(pipe_or_transformer, {name}(...)), instead; either repairs this transformer too."
        )

    def _given(self) -> dict[str, object]:
        """The arguments that differ from their defaults."""
        named = ((f, getattr(self, f.name)) for f in fields(self) if f.init)
        return {f.name: value for f, value in named if value != f.default}

    def _resolved(self, resolved: Resolved) -> dict[str, object]:
        """The arguments as resolved for a model."""
        parts = (resolved.policy, resolved.schedule)
        values = {f.name: getattr(p, f.name) for p in parts if p is not None for f in fields(p)}  # type: ignore[arg-type]
        return {**self._given(), **values} if resolved.policy is not None else self._given()

    def __repr__(self) -> str:
        resolved = self.binding.resolved
        values = self._given() if resolved is None else self._resolved(resolved)
        text = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
        return text if resolved is None else f"{text} on {resolved.variant} ({self.binding.model})"


@dataclass(frozen=True, eq=False, repr=False)
class DenseProcessor(Processor):
    """Dense attention everywhere, on the same path: the baseline of a comparison, with the same report.

    Through the backend that was chosen with `set_attention_backend`; else through the fastest there is. For generation
    in half precision on a GPU that is our own kernel where text is part of the sequence (HunyuanVideo, Mochi), and on
    Hopper, for long sequences with head_dim 128, the first that is here of FlashAttention-3, FlashAttention-4
    (`pip install -e ".[fa4]"`) and ours. `report().dense_backend` names it.

    Args:
        fused_norm, quant: see `KernelOptions`; integer attention is by our own kernel, for inference.
        logit: `FarLogits`, for videos beyond the trained length, by our own kernel; see there.

    Raises:
        TypeError, ValueError: an unknown fused_norm, quant or logit; with quant or logit, at a forward, a backend that
            was chosen with `set_attention_backend`.
        NotImplementedError: with quant or logit, at a forward, ring attention, or training.
    """

    fused_norm: str = "auto"
    quant: str | None = None
    logit: FarLogits | None = None

    def __post_init__(self) -> None:
        self._options()

    def _options(self) -> KernelOptions:
        return KernelOptions(fused_norm=self.fused_norm, quant=self.quant, logit=self.logit)

    def resolve(
        self, model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
    ) -> Resolved:
        """Nothing to choose."""
        return Resolved(model_variant(model, experts=experts), None, DenseSchedule(), self._options())


@dataclass(frozen=True, eq=False, repr=False)
class SparseProcessor(Processor):
    """What the processors of all sparse methods have in common: where attention stays dense, and how kernels run.

    Args:
        first_steps, last_steps: dense denoising steps at either end of a run: an int, or a float as a fraction of it.
            Dense last steps remove flicker. None takes what suits the model.
        first_layers, last_layers: dense layers at either end of the depth.
        num_steps: denoising steps of a run; needed only where no pipeline says, for fractions and last steps.
        backend: kernel of the sparse calls: "auto", "triton", "torch", "fa4" or "flex"; see `KernelOptions`.
        fused_norm: "auto", "on" or "off": whether one kernel norms and rotates queries and keys; see `KernelOptions`.
        quant: integer attention in sparse calls, "int8", "int8-fp8" or "int8-int8", for inference; see `KernelOptions`.
            Dense steps and layers, searches among them, are left in full precision.
        logit: `FarLogits`, for videos beyond the trained length, in sparse and dense calls; see there.

    Raises:
        TypeError, ValueError: a value out of range, at once; at binding, more dense layers than the model has; at the
            first forward of a run, a fraction of steps without a pipeline or `num_steps`.
        NotImplementedError: training with quant or logit.
    """

    first_steps: int | float | None = field(default=None, kw_only=True)
    last_steps: int | float | None = field(default=None, kw_only=True)
    first_layers: int | None = field(default=None, kw_only=True)
    last_layers: int | None = field(default=None, kw_only=True)
    num_steps: int | None = field(default=None, kw_only=True)
    backend: str = field(default="auto", kw_only=True)
    fused_norm: str = field(default="auto", kw_only=True)
    quant: str | None = field(default=None, kw_only=True)
    logit: FarLogits | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_steps is not None and (type(self.num_steps) is not int or self.num_steps < 1):
            raise ValueError(
                f"num_steps must be an int of at least 1 (got {self.num_steps!r}); pass the number of denoising steps."
            )
        # what was given is checked here, where the mistake is, not at the first forward
        self._schedule(0, 0)
        self._options()

    def _schedule(self, first_steps: int | float, first_layers: int) -> DenseSchedule:
        """The schedule that was asked for; what was not given is that of the model."""
        return DenseSchedule(
            first_steps=first_steps if self.first_steps is None else self.first_steps,
            last_steps=0 if self.last_steps is None else self.last_steps,
            first_layers=first_layers if self.first_layers is None else self.first_layers,
            last_layers=0 if self.last_layers is None else self.last_layers,
        )

    def _options(self) -> KernelOptions:
        return KernelOptions(self.backend, self.quant, self.logit, self.fused_norm)


@dataclass(frozen=True, eq=False, repr=False)
class RadialProcessor(SparseProcessor):
    """Radial Attention (arXiv 2506.19852): static block maps that thin out with distance in time.

    Every argument but `block` that is None takes the value published for the model it gets bound to, or the nearest
    there is: see `radial_defaults`. `repr` shows what was taken. Further arguments are those of `SparseProcessor`.

    Args:
        decay: width of the bands, > 0; larger is denser.
        block: rows of a block, 64 or 128, or (query rows, key rows). None takes (128, 64), and 64 where frames have
            fewer than 512 tokens.
        coverage: "majority" or "any": when a block counts as inside a band.
        sink: whether all read the whole first latent frame.
        first_neighbour: "full" or "half": how much adjacent frames see of each other.

    Raises:
        TypeError, ValueError: see `SparseProcessor`.
    """

    decay: float | None = None
    block: int | tuple[int, int] | None = None
    coverage: str | None = None
    sink: bool | None = None
    first_neighbour: str | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            object.__setattr__(self, "block", _pair(self.block))
        super().__post_init__()
        self._policy(RadialDefaults(1.0, True, 0, 0))

    def resolve(
        self, model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
    ) -> Resolved:
        """The given arguments, and `radial_defaults` for the others."""
        defaults = radial_defaults(model, experts=experts)
        return Resolved(
            model_variant(model, experts=experts),
            self._policy(defaults, grid),
            self._schedule(defaults.first_steps, defaults.first_layers),
            self._options(),
        )

    def _policy(self, defaults: RadialDefaults, grid: VideoGrid | None = None) -> RadialPolicy:
        values = {"decay": defaults.decay, "block": block_for(grid), "sink": defaults.sink}
        for name in ("decay", "block", "coverage", "sink", "first_neighbour"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return RadialPolicy(**values)  # type: ignore[arg-type]  # checked by the policy itself


# As published (arXiv 2502.21079): 10 of 50 steps are dense, the last of them searches; every layer is sparse.
_ADASPA_FIRST_STEPS = 0.2


@dataclass(frozen=True, eq=False, repr=False)
class AdaSpaProcessor(SparseProcessor):
    """AdaSpa (arXiv 2502.21079): block maps that are searched for in every layer and head while the video is made.

    The last of the dense first steps measures the attention of every block; each row keeps the blocks that hold most,
    and the map is refreshed once, later in the run, without another dense step. The defaults are the published ones but
    for `block` and `sample`, for every model. Further arguments are those of `SparseProcessor`; `first_steps` is 0.2
    unless given, and 0 makes the first step search, unless it is the only one. For generation only: what it keeps
    between steps rules training out.

    Compiled blocks take four graphs for a video size, dense, search, refresh and sparse, those of Mochi twice as many:
    to generate several sizes with compiled blocks, raise `torch._dynamo.config.recompile_limit`, which is 8.

    Args:
        density: share of the video blocks that a row keeps, in (0, 1], mean over heads.
        refresh: when to search again: a fraction of the run, a step counted from 1, or a sequence of either; () never.
        block: rows of a block, 64 or 128, or (query rows, key rows). None takes (128, 64), and 64 where frames have
            fewer than 512 tokens.
        head_adaptive: whether heads with much of their attention in few blocks give blocks to the others.
        recall_threshold: share of the attention above which a head can give, in (0, 1].
        sample: rows of a block of queries that a search visits, 8, 16, 32 or 64; None visits all, which is exact, takes
            seven times as long with blocks of 128 rows, and gains .004 of recall at most.
        lse_dtype: "float32" or "bfloat16": how the normalisers of the dense step are kept.
        offload_state: keep maps and normalisers in the memory of the CPU between calls; not with compiled blocks.

    Raises:
        TypeError, ValueError: see `SparseProcessor`; at the first forward of a run, a refresh that is not after the
            search.
        RuntimeError: training; a video that changes its size in the middle of a run.
    """

    density: float = 0.2
    refresh: int | float | tuple[int | float, ...] = (0.6,)
    block: int | tuple[int, int] | None = None
    head_adaptive: bool = True
    recall_threshold: float = 0.8
    sample: int | None = 16
    lse_dtype: str = "float32"
    offload_state: bool = False

    def __post_init__(self) -> None:
        if self.block is not None:
            object.__setattr__(self, "block", _pair(self.block))
        object.__setattr__(self, "refresh", _several(self.refresh))
        super().__post_init__()
        policy, schedule = self._policy(), self._schedule(_ADASPA_FIRST_STEPS, 0)
        if self.num_steps is not None:
            policy.check_run(schedule, self.num_steps)

    def resolve(
        self, model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
    ) -> Resolved:
        """The given arguments; the defaults are the same for every model."""
        schedule = self._schedule(_ADASPA_FIRST_STEPS, 0)
        return Resolved(model_variant(model, experts=experts), self._policy(grid), schedule, self._options())

    def _policy(self, grid: VideoGrid | None = None) -> AdaSpaPolicy:
        values = {f.name: getattr(self, f.name) for f in fields(AdaSpaPolicy)}
        if self.block is None:
            values["block"] = block_for(grid)
        return AdaSpaPolicy(**values)


# The paper leaves no step dense that could be told from its text; as for AdaSpa, whose search needs such steps, too.
_PARO_FIRST_STEPS = 0.2


@dataclass(frozen=True, eq=False, repr=False)
class PAROProcessor(SparseProcessor):
    """PAROAttention (arXiv 2506.16054): every head reads the video in the order of axes that suits it, by block maps.

    With a plan, a file that `videosparse calibrate` makes, orders and maps are known beforehand: see
    `PAROPlan`. Without one it is *online*, our extension: the last of the dense first steps looks at all six
    orders and chooses orders and maps for the rest of the run, at the cost of about three dense attention calls per
    layer and branch. Token orders of a plan serve other sizes of video, its maps do not: with `online_maps` that step
    finds maps in the plan's orders. The samples of a batch share the orders that a run finds, so a video that is made
    online depends on those beside it. Further arguments are those of `SparseProcessor`; `first_steps` is 0.2 unless
    given, and 0 makes an online run search in its first step. Training works with a plan alone.

    Args:
        plan: a file, or a `PAROPlan`; None is online.
        density: online, the share of the video blocks that a row keeps; None takes the plan's, else .2.
        block: rows of a block, 64 or 128, or (query rows, key rows); None takes the plan's, else (128, 64), and 64
            where frames have fewer than 512 tokens.
        alpha: online, the weight of sparsity in the choice of an order, 0..1; None takes .5.
        online_maps: find maps in the run, in the orders of the plan.
        order_by: online, how a head's order is chosen: "metric" is the paper's, "mass" takes the order in which the
            blocks that its map keeps hold most of the attention; None takes "metric".

    Raises:
        TypeError, ValueError: see `SparseProcessor`; a plan that is missing or damaged; at binding, one for another
            model; at a forward, one for another grid.
        NotImplementedError: ring attention; at binding, online_maps under context parallelism; training with quant.
        RuntimeError: training without a plan; a video that changes its size in the middle of an online run.
    """

    plan: str | Path | PAROPlan | None = None
    density: float | None = None
    block: int | tuple[int, int] | None = None
    alpha: float | None = None
    online_maps: bool = False
    order_by: str | None = None
    _loaded: list[PAROPlan] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.block is not None:
            object.__setattr__(self, "block", _pair(self.block))
        if self.plan is not None and not isinstance(self.plan, str | Path | PAROPlan):
            raise TypeError(f"plan must be the path of a plan or a PAROPlan (got {type(self.plan).__name__}).")
        super().__post_init__()
        self._policy()

    def resolve(
        self, model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
    ) -> Resolved:
        """The given arguments and the defaults, the same for every model, once the plan is found to fit.

        Raises:
            ValueError: the plan is for another model, grid or number of experts.
        """
        variant, policy = model_variant(model, experts=experts), self._policy(grid)
        found = policy.calibrated
        if found is not None:
            found.check_experts(experts)
            if isinstance(model, ModelSpec):
                found.check_sizes(model.layers, model.heads)
            else:
                found.check_model(model)
            if grid is not None and not policy.searches:
                found.check_grid(grid)
        return Resolved(variant, policy, self._schedule(_PARO_FIRST_STEPS, 0), self._options())

    def check_transformer(self, transformer: torch.nn.Module, config: Mapping[str, Any], expert: int) -> None:
        """Raise ValueError where the plan is for another configuration, or knows the weights as the other's."""
        if (plan := self._plan()) is not None:
            plan.check_model(config, expert)
            plan.check_weights(transformer, expert)

    def _policy(self, grid: VideoGrid | None = None) -> PAROPolicy:
        block: Any = self.block
        if block is None and self.plan is None:
            block = block_for(grid)
        return PAROPolicy(self._plan(), self.density, block, self.alpha, self.online_maps, self.order_by)

    def _plan(self) -> PAROPlan | None:
        """The plan, read once."""
        if self.plan is None or isinstance(self.plan, PAROPlan):
            return self.plan
        if not self._loaded:
            self._loaded.append(PAROPlan.load(self.plan))
        return self._loaded[0]


def _several(values: Any) -> Any:
    """One number, or any sequence of them, as a tuple; the policy checks what it holds."""
    return (values,) if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)


def _pair(block: Any) -> tuple[int, int]:
    """(query rows, key rows) from one number or any sequence of two."""
    try:
        rows, columns = (block, block) if isinstance(block, int) else (operator.index(rows) for rows in block)
    except (TypeError, ValueError):
        raise TypeError(f"block must be 64 or 128, or a pair (query rows, key rows) (got {block!r}).") from None
    return rows, columns
