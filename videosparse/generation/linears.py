"""Linear layers of the transformer blocks in FP8, by torchao: `quantize_linears`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from videosparse.checking import check_device
from videosparse.generation.errors import GenerationError, nearest, one_line
from videosparse.models import family_of
from videosparse.wording import install_extra

LINEARS = ("none", "fp8")
"""What the linear layers of the blocks can be computed in; "none" leaves them as they are."""

_LEAST_CAPABILITY = (8, 9)
_MULTIPLE = 16
"""Tensor cores multiply 8-bit matrices whose sides are multiples of this."""


def check_kind(kind: str) -> None:
    """Raise GenerationError unless `kind` is one of `LINEARS`."""
    if kind not in LINEARS:
        raise GenerationError(f"Unknown linears {kind!r}; use {' or '.join(LINEARS)}.{nearest(kind, LINEARS)}")


def unavailable(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why FP8 linears cannot run on a device with weights of a dtype, and what to do; None where they can."""
    if importlib.util.find_spec("torchao") is None:
        return f"torchao is not installed; {install_extra('fp8')}, or drop it"
    device = check_device(device)
    if device.type != "cuda":
        return f"it needs a GPU of compute capability 8.9 or newer, and this run is on {device}; drop it"
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return f"it needs compute capability 8.9 or newer (got {found[0]}.{found[1]}); drop it"
    if dtype is not torch.bfloat16:
        return f"torchao scales rows of bfloat16 weights only (got {dtype}); use --dtype bf16"
    return None


def quantize_linears(
    transformer: torch.nn.Module, *, kind: str = "fp8", device: torch.device | str | None = None
) -> int:
    """Make the linear layers of the blocks multiply FP8 values (e4m3), in place; nothing is calibrated.

    Weights are rounded once, with a scale for each output row, and take half the memory; activations at every call,
    with a scale for each token. Sums are fp32, outputs bf16. Embeddings, modulation, norms, text refiners and the last
    projection stay as they are: they are small, and every token passes through them. LoRAs stay in their dtype, too,
    and are added to the output of the rounded layer, whether they are loaded before or after.

    Compile the blocks, too (`compile_blocks`): eager, finding the scales takes kernels of its own.

    Args:
        transformer: of a supported family, weights in bf16, on any device.
        kind: "fp8", torchao's `Float8DynamicActivationFloat8WeightConfig` by row.
        device: where the transformer goes, layer by layer, so that its weights in bf16 need never fit there; None
            leaves it where it is.

    Returns:
        The number of layers. Those whose sides are no multiples of 16 are left out.

    Raises:
        GenerationError: an unknown kind; torchao is missing or cannot run here; weights of another dtype; no layer that
            suits, or a transformer that was quantized before.
        TypeError: no supported transformer, or device is neither a device nor a name.
        ValueError: device names none.
    """
    check_kind(kind)
    if device is not None:
        device = check_device(device)
    if kind == "none":
        return 0
    names = set(suitable(transformer))
    if not names:
        raise GenerationError(
            f"linears=fp8: no linear layer in the blocks of this {type(transformer).__name__} is plain and has sides "
            "that are multiples of 16; drop it."
        )
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise GenerationError(
            f"linears=fp8 needs torchao ({one_line(error)}); {install_extra('fp8')}, or drop it."
        ) from error
    # torchao would set options of torch.compile for the whole process
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    try:
        quantize_(transformer, config, filter_fn=lambda module, name: name in names, device=device)
    except (AssertionError, NotImplementedError, ImportError) as error:  # how torchao refuses a GPU or a build of torch
        raise GenerationError(f"linears=fp8 cannot run here: {one_line(error)}; drop it.") from error
    return len(names)


def suitable(transformer: torch.nn.Module) -> Iterator[str]:
    """Names of the linear layers to quantize, those of its LoRAs' bases among them.

    Raises:
        GenerationError: one of them has another dtype than bf16.
    """
    modules = dict(transformer.named_modules())
    blocks = {attention.name.rpartition(".")[0] for attention in family_of(transformer).attentions(transformer)}
    for block in sorted(blocks):
        for inner, module in modules[block].named_modules():
            parts = inner.split(".")
            aside = any(part.startswith(("norm", "lora_")) for part in parts)
            if isinstance(module, torch.nn.Linear) and not aside and _suits(module, f"{block}.{inner}"):
                yield f"{block}.{inner}"


def _suits(linear: Any, name: str) -> bool:
    """Whether a linear layer is plain and of a size that FP8 products take.

    Raises:
        GenerationError: it has another dtype than bf16.
    """
    weight = linear.weight
    if type(weight) not in (torch.nn.Parameter, torch.Tensor):
        return False  # somebody quantized it already
    if weight.dtype is not torch.bfloat16:
        raise GenerationError(f"linears=fp8 needs weights in bfloat16 ({name} is {weight.dtype}); use --dtype bf16.")
    return all(side % _MULTIPLE == 0 for side in weight.shape)
