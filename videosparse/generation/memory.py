"""What would help where a GPU is full, with numbers from the weights of the pipeline that did not fit."""

from __future__ import annotations

from typing import Any

import torch

from videosparse.components import targets
from videosparse.generation.environment import DTYPES
from videosparse.generation.linears import suitable, unavailable
from videosparse.generation.request import Settings
from videosparse.models import family_of

_GIB = 2**30


def knobs(pipe: Any, settings: Settings) -> str:
    """Options that take less memory than those of a run, the ones that cost least first."""
    offload, transformers = settings.stack.offload, targets(pipe)[1]
    parts = {name: _bytes(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    total, largest = sum(parts.values()), max(parts, key=lambda name: parts[name])
    found = []
    if offload == "none" and len(parts) > 1:
        found.append(
            f"--offload model ({_gib(parts[largest])} of weights at a time, the {largest}, instead of {_gib(total)})"
        )
    if settings.stack.linears == "none" and unavailable(settings.device, DTYPES[settings.dtype]) is None:
        saved = sum(_halved(transformer) for transformer in transformers)
        found.append(f"--linears fp8 ({_gib(saved)} less)")
    if offload != "group":
        block = max(_largest_block(transformer) for transformer in transformers)
        found.append(f"--offload group (two blocks of {_gib(block)} at a time)")
    tokens = settings.grid.tokens
    return f"try {', '.join([*found, f'fewer frames or a smaller size (these are {tokens:,} tokens)'])}"


def _bytes(module: torch.nn.Module) -> int:
    return sum(_size(parameter) for parameter in module.parameters())


def _size(parameter: torch.Tensor) -> int:
    stored = getattr(parameter, "qdata", parameter)  # torchao's tensors say what they stand for
    return int(stored.numel() * stored.element_size())


def _halved(transformer: torch.nn.Module) -> int:
    """Bytes that FP8 saves: half of its linear layers, which are bf16 then."""
    return sum(transformer.get_submodule(name).weight.numel() for name in suitable(transformer))  # type: ignore[operator,misc]


def _largest_block(transformer: torch.nn.Module) -> int:
    names = {attention.name.rpartition(".")[0] for attention in family_of(transformer).attentions(transformer)}
    return max(_bytes(transformer.get_submodule(name)) for name in names)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
