"""Every name that Diffusers keeps to itself and that we rely on: attention dispatch, hook registry, parallel configs.

Written against 0.41 to 0.43. When a release moves one of these names, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)

_EVENTS = "videosparse"
Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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

    def is_parallel(self) -> bool:
        """Whether ranks share the attention (Ulysses or ring)."""
        return self._parallel_config is not None

    def backend_name(self) -> str:
        """What runs `dense`, as Diffusers names it; its default, torch's own attention, is "native SDPA"."""
        active, _ = _AttentionBackendRegistry.get_active_backend()
        name = AttentionBackendName(self._attention_backend or active).value
        return "native SDPA" if name == AttentionBackendName.NATIVE.value else str(name)

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """Attention through the backend that the user chose; q, k, v [B, L, H, D], key_mask bool [B, L] or None."""
        mask = None if key_mask is None else key_mask[:, None, None, :]
        out: torch.Tensor = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out

    def gathered(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, core: Core) -> torch.Tensor:
        """Run `core` on whole sequences, with a share of the heads on each rank (Ulysses)."""
        if self._parallel_config is None:
            return core(q, k, v)

        def forward_op(
            ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            return core(q, k, v)

        out: torch.Tensor = _templated_context_parallel_attention(
            q, k, v, forward_op=forward_op, backward_op=None, _parallel_config=self._parallel_config
        )
        return out

    def check_parallel(self, *, joint: bool, sparse: bool, searches: bool, by_head: bool) -> None:
        """Raise NotImplementedError for context parallelism whose shards do not fit.

        Args:
            joint: text is part of the sequence.
            sparse: some calls read block maps.
            searches: these maps are searched for while the video is made.
            by_head: these maps differ from head to head.
        """
        config = getattr(self._parallel_config, "context_parallel_config", None)
        if config is None:
            return
        if searches:
            raise NotImplementedError(
                "Methods that search for their maps (AdaSpa, PAROAttention without a plan) do not work with context "
                "parallelism: they look at all heads of a layer, and a rank sees its share. Use one GPU, or "
                "RadialProcessor()."
            )
        if by_head:
            raise NotImplementedError(
                "Plans of PAROAttention do not work with context parallelism: every head has its own order and map, "
                "and a rank sees its share of the heads. Use one GPU, or RadialProcessor()."
            )
        if sparse and config.ring_degree > 1:
            raise NotImplementedError(
                f"Sparse attention does not work with ring attention (ring_degree={config.ring_degree}): a rank never "
                "sees all keys. Use ContextParallelConfig(ulysses_degree=...), or DenseProcessor()."
            )
        if joint:
            raise NotImplementedError(
                "Context parallelism is available for Wan only: where text is part of the sequence, gathered shards "
                "come in another order than video, text. Use one GPU, or videosparse.restore(...)."
            )


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
