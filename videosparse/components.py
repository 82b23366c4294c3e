"""The transformers of a pipeline: which there are, how many share a run, and which of them one is."""

from __future__ import annotations

import torch

_COMPONENTS = ("transformer", "transformer_2")


def targets(pipe_or_transformer: object) -> tuple[object | None, list[torch.nn.Module]]:
    """(pipeline or None, its transformers), wrappers of torch.compile removed.

    Raises:
        TypeError: a pipeline without a transformer, or neither a pipeline nor a module.
    """
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return None, [unwrapped(pipe_or_transformer)]
    parts = (getattr(pipe_or_transformer, name, None) for name in _COMPONENTS)
    transformers = [unwrapped(part) for part in parts if isinstance(part, torch.nn.Module)]
    if not transformers:
        raise TypeError(
            "Expected a Diffusers pipeline with a transformer, or a transformer "
            f"(got {type(pipe_or_transformer).__name__}); pass what from_pretrained returned."
        )
    return pipe_or_transformer, transformers


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile has wrapped, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, torch.nn.Module) else module


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile holds the call of a module, or its forward below the hooks of Diffusers."""
    forward = vars(module).get("forward")
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def experts_of(pipeline: object | None) -> int:
    """2 for a pipeline of two noise-level experts, also while only one of them is loaded."""
    config = getattr(pipeline, "config", {})
    return 2 if getattr(pipeline, "transformer_2", None) is not None or config.get("boundary_ratio") else 1


def number_of(pipeline: object | None, transformer: torch.nn.Module) -> int:
    """Number of a transformer among those of its pipeline that share a run, from 0."""
    second = getattr(pipeline, _COMPONENTS[1], None)
    return int(isinstance(second, torch.nn.Module) and unwrapped(second) is transformer)
