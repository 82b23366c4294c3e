"""Every name that Diffusers keeps to itself and that we rely on: attention dispatch, hook registry, parallel configs.

Written against 0.41 to 0.43. When a release moves one of these names, this is the file to change.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ContextParallelConfig, DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import ContextParallelSplitHook, apply_context_parallel
from diffusers.hooks.group_offloading import _LAZY_PREFETCH_GROUP_OFFLOADING
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput, ParallelConfig
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from videosparse.copies import in_copy

_EVENTS = "videosparse"
_STEP_CACHES = ("fbc_leader_block_hook", "mag_cache_leader_block_hook")


@dataclass(frozen=True)
class Ulysses:
    """The ranks that share an attention: how many, which one this is, their process group, and whether shards of the
    sequence may differ in length."""

    ranks: int
    rank: int
    group: Any
    uneven: bool


class HostProcessor:
    """The side of an attention processor that Diffusers sees and sets, from `set_attention_backend` and the like.

    Args:
        replaced: the processor that this one replaces, stock or another of ours, whose backend and parallel config it
            takes over: replacing one after `enable_parallelism` would otherwise silently attend to one shard.

    Attributes:
        stock: the processor to give back.
    """

    stock: Any
    _attention_backend: Any
    _parallel_config: Any

    def __init__(self, replaced: Any) -> None:
        self.stock = replaced.stock if isinstance(replaced, HostProcessor) else replaced
        self._attention_backend = getattr(replaced, "_attention_backend", None)
        self._parallel_config = getattr(replaced, "_parallel_config", None)

    def give_back(self) -> Any:
        """The stock processor, with the backend and parallel config that were chosen in the meantime."""
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(self.stock, name) and getattr(self.stock, name) != getattr(self, name):
                setattr(self.stock, name, getattr(self, name))
        return self.stock

    def backend_chosen(self) -> bool:
        """Whether the user chose a backend: for this model, by a context manager, or in the environment."""
        active, _ = _AttentionBackendRegistry.get_active_backend()
        return self._attention_backend is not None or active != AttentionBackendName.NATIVE

    def ulysses(self) -> Ulysses | None:
        """Who shares the attention by heads; None where nobody does."""
        config = getattr(self._parallel_config, "context_parallel_config", None)
        if config is None or config.ring_degree > 1:
            return None
        mesh = config._ulysses_mesh
        return Ulysses(config.ulysses_degree, config._ulysses_local_rank, mesh.get_group(), config.ulysses_anything)

    def ring_degree(self) -> int:
        """How many ranks pass keys and values around; 1 where none do."""
        config = getattr(self._parallel_config, "context_parallel_config", None)
        return 1 if config is None else int(config.ring_degree)

    def ulysses_degree(self) -> int:
        """How many ranks share the heads; 1 where none do."""
        config = getattr(self._parallel_config, "context_parallel_config", None)
        return 1 if config is None else int(config.ulysses_degree)

    def backend_name(self) -> str:
        """What runs `dense`, as Diffusers names it; its default, torch's own attention, is "native SDPA"."""
        active, _ = _AttentionBackendRegistry.get_active_backend()
        name = AttentionBackendName(self._attention_backend or active).value
        return "native SDPA" if name == AttentionBackendName.NATIVE.value else str(name)

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """Attention through the backend that the user chose; q, k, v [B, L, H, D], key_mask bool [B, L] or None."""
        mask = None if key_mask is None else key_mask[:, None, None, :]
        # under Ulysses these are whole sequences already
        config = self._parallel_config if self.ring_degree() > 1 else None
        out: torch.Tensor = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=config
        )
        return out


def enable_ulysses(transformer: Any, ranks: int, plan: Mapping[str, Any] | None, uneven: bool) -> None:
    """What `transformer.enable_parallelism` does, which itself insists on an accelerator.

    Args:
        transformer: on the device of this rank.
        ranks: of the process group.
        plan: what to split and to gather; None is the transformer's own.
        uneven: whether shards may differ in length.
    """
    config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=uneven)
    if transformer.device.type == "cpu":
        _enable_on_cpu(transformer, config, plan)
    else:
        transformer.enable_parallelism(config=config, cp_plan=None if plan is None else dict(plan))
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if isinstance(hook, ContextParallelSplitHook) and "hidden_states" in hook.metadata:
                # it looks at a signature when it is first called, which no compiled block can do
                hook.module_forward_metadata._get_parameter_from_args_kwargs("hidden_states", [None], {})


def _enable_on_cpu(transformer: Any, config: ContextParallelConfig, plan: Mapping[str, Any] | None) -> None:
    ranks = config.ulysses_degree
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, ranks), mesh_dim_names=("ring", "ulysses"))
    _enable_on(mesh, transformer, config, plan, transformer.device)


def enable_ulysses_in_groups(
    transformer: Any, degree: int, plan: Mapping[str, Any] | None, device: torch.device
) -> None:
    """As `enable_ulysses`, but every `degree` neighbouring processes share, beside other such groups.

    Args:
        transformer: of which a part may be elsewhere than on its device, as long as weights are not sharded.
        degree: processes that share.
        plan: as in `enable_ulysses`.
        device: of this rank.
    """
    shape = (torch.distributed.get_world_size() // degree, 1, degree)
    mesh = torch.distributed.device_mesh.init_device_mesh(
        device.type, shape, mesh_dim_names=("groups", "ring", "ulysses")
    )
    _enable_on(mesh["ring", "ulysses"], transformer, ContextParallelConfig(ulysses_degree=degree), plan, device)


def _enable_on(
    mesh: Any, transformer: Any, config: ContextParallelConfig, plan: Mapping[str, Any] | None, device: torch.device
) -> None:
    config.setup(mesh["ulysses"].get_local_rank(), config.ulysses_degree, device, mesh)
    parallel = ParallelConfig(context_parallel_config=config)
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    transformer._parallel_config = parallel
    apply_context_parallel(transformer, config, transformer._cp_plan if plan is None else dict(plan))


def split_video(rotary_dims: int) -> dict[str, Any]:
    """The context-parallel plan of a transformer with text in its sequence: split video, leave text on all ranks.

    Args:
        rotary_dims: dimensions of the (cos, sin) that its `rope` returns, tokens first.
    """
    rope = ContextParallelInput(split_dim=0, expected_dims=rotary_dims, split_output=True)
    return {
        "rope": {0: rope, 1: rope},
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def is_parallel(transformer: Any) -> bool:
    """Whether ranks share a transformer already."""
    return getattr(transformer, "_parallel_config", None) is not None


class RunEvents(ModelHook):  # type: ignore[misc]  # untyped base
    """Tells which guidance branch a pipeline is in, and when its run ends.

    Diffusers finds stateful hooks in the registry of a model and tells them both. The hook is entered there without
    wrapping `forward`: offloading swaps `forward` between two generations, and would lose or resurrect a wrapper.
    """

    _is_stateful = True

    def __init__(self, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._contexts = StateManager(BaseState)
        self._on_end = on_end

    @property
    def context(self) -> str | None:
        """Name of the current branch ("cond", "uncond", ...), None where the pipeline does not say."""
        return getattr(self._contexts._context, "name", None)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by the pipeline at the end of a run."""
        self._on_end()
        return module

    def install(self, model: torch.nn.Module) -> None:
        """Enter the registry of `model`."""
        registry = HookRegistry.check_if_exists_or_initialize(model)
        # in front: a hook that is removed hands its forward to the next in line, which must not be this one
        registry.hooks[_EVENTS] = self
        registry._hook_order.insert(0, _EVENTS)
        registry._fn_refs.insert(0, self.fn_ref)

    @staticmethod
    def remove(model: torch.nn.Module) -> None:
        """Leave the registry of `model`; nothing happens when not in it."""
        registry = HookRegistry.check_if_exists_or_initialize(model)
        if registry.hooks.pop(_EVENTS, None) is not None:
            place = registry._hook_order.index(_EVENTS)
            del registry._hook_order[place], registry._fn_refs[place]


class _Bar:
    """A progress bar that tells when the block that it is open in is left by an exception."""

    def __init__(self, bar: Any, on_failure: Callable[[], None]) -> None:
        self._bar, self._on_failure = bar, on_failure

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if kind is not None:
            self._on_failure()
        return self._bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class FailureEvents:
    """Tells when a run of a pipeline ends by an exception outside its transformer, in a callback or on Ctrl-C.

    Diffusers tells the hooks of a model about runs that succeed alone. Every pipeline denoises inside
    `with self.progress_bar(...)`, so this takes the place of that method, of one pipeline.

    Args:
        pipeline: holds this, so it is held weakly.
        on_failure: what to call.
    """

    def __init__(self, pipeline: Any, on_failure: Callable[[], None]) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._on_failure = on_failure
        before = vars(pipeline).get("progress_bar")
        self._before: Any = before._before if isinstance(before, FailureEvents) else before

    def __deepcopy__(self, memo: dict[int, Any]) -> FailureEvents:
        twin = copy.copy(self)
        twin._pipeline = in_copy(self._pipeline, memo)
        twin._on_failure, twin._before = copy.deepcopy((self._on_failure, self._before), memo)
        return twin

    def __call__(self, iterable: Any = None, total: int | None = None) -> _Bar:
        """The pipeline's own bar."""
        # of a shallow copy whose original is gone, a plain bar
        pipeline: Any = self._pipeline() or SimpleNamespace()
        bar = partial(DiffusionPipeline.progress_bar, pipeline) if self._before is None else self._before
        return _Bar(bar(iterable=iterable, total=total), self._on_failure)

    @classmethod
    def install(cls, pipeline: Any, on_failure: Callable[[], None]) -> None:
        """Begin to tell; nothing happens where a pipeline has no progress bar."""
        if hasattr(pipeline, "progress_bar"):
            vars(pipeline)["progress_bar"] = cls(pipeline, on_failure)

    @classmethod
    def remove(cls, pipeline: Any) -> None:
        """Stop telling; nothing happens where it was not begun."""
        found = vars(pipeline).get("progress_bar")
        if isinstance(found, cls):
            del vars(pipeline)["progress_bar"]
            if found._before is not None:
                vars(pipeline)["progress_bar"] = found._before


def default_processor(attn: torch.nn.Module, stock: str) -> Any:
    """A fresh processor of the kind that `attn` ships with; `stock` names it for a self-attention of a family.

    Raises:
        TypeError: nothing says which kind that is.
    """
    from diffusers.models import attention_processor
    from diffusers.models.transformers import transformer_hunyuan_video

    named = getattr(attention_processor, stock, None) or getattr(transformer_hunyuan_video, stock, None)
    found = getattr(attn, "_default_processor_cls", None) or named
    if found is None:
        raise TypeError(f"No stock processor is known for {type(attn).__name__}; load the model again.")
    return found()


def step_cache_states(transformer: torch.nn.Module) -> StateManager:
    """What the step cache of a transformer (`enable_cache`) knows, by branch.

    `get_state()` is that of the branch that runs: whether its last forward computed all blocks is `should_compute`, and
    a MagCache that measures has `calibration_ratios`. The branch is `context.name`.

    Raises:
        LookupError: there is no step cache.
    """
    for module in transformer.modules():
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            if name in _STEP_CACHES:
                return hook.state_manager
    raise LookupError(f"{type(transformer).__name__} has no step cache.")


def settle_prefetch(transformer: torch.nn.Module) -> None:
    """Tell group offloading with streams the order of a transformer's blocks before anything runs.

    Diffusers looks at the order during the first forward and then takes its hooks for that away. What was hooked to a
    block in the meantime, as a step cache is, loses its part in every later forward then. Without such hooks nothing
    changes.
    """
    registry = getattr(transformer, "_diffusers_hook", None)
    lazy = None if registry is None else registry.get_hook(_LAZY_PREFETCH_GROUP_OFFLOADING)
    if lazy is None:
        return
    blocks = [item for item in transformer.named_modules() if item[0] in lazy._layer_execution_tracker_module_names]
    lazy.execution_order.extend(blocks)
    lazy.post_forward(transformer, None)
