"""Integer attention: what it refuses, and whether Triton or plain torch runs a call."""

from __future__ import annotations

import logging
from functools import cache

import torch

from videosparse.kernels import gpu
from videosparse.kernels.backend import interpreted
from videosparse.kernels.call import AttentionCall

logger = logging.getLogger("videosparse")

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def check(q: torch.Tensor, quant: str, need_grad: bool) -> None:
    """Raise unless integer attention takes tensors like q [B, L, H, D].

    Raises:
        NotImplementedError: gradients are needed.
        TypeError: q is not fp16 or bf16.
        ValueError: head_dim is not 64 or 128.
    """
    if need_grad:
        raise NotImplementedError(
            f'quant="{quant}" is for inference: it has no gradient. Use torch.no_grad(), or quant=None in training.'
        )
    if q.dtype not in DTYPES:
        raise TypeError(f'quant="{quant}" takes float16 and bfloat16 (got {q.dtype}); cast q, k and v, or use None.')
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f'quant="{quant}" takes head_dim 64 and 128 (got {q.shape[3]}); use quant=None.')


def unavailable(quant: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a model cannot run with integer attention; None when it can."""
    if dtype not in DTYPES:
        return f"it takes float16 and bfloat16 (got {str(dtype).removeprefix('torch.')})"
    if head_dim not in HEAD_DIMS:
        return f"it takes head_dim 64 and 128 (got {head_dim})"
    if quant == "int8-fp8" and device.type == "cuda" and not has_fp8(device):
        return (
            f"it needs FP8 tensor cores, compute capability 8.9 or newer, which {device} has not; int8-int8 needs none"
        )
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, quant: str, chosen: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer attention of checked tensors [B, L, H, D].

    Args:
        quant: see `KernelOptions`.
        chosen: "triton" or "torch".

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        RuntimeError: quant is "int8-fp8" and the GPU has no FP8 tensor cores.
    """
    values = values_of(quant)
    if chosen == "torch":
        from videosparse.kernels import torch_int8

        _tell(f'attend computes quant="{quant}" in plain torch on {q.device.type}, which is not faster.')
        return torch_int8.forward(q, k, v, call, need_lse, values)
    if q.numel() == 0:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]) if need_lse else (0,), device=q.device)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse.float()
    if values == "fp8" and not has_fp8(q.device):
        raise RuntimeError(
            f'quant="int8-fp8" needs FP8 tensor cores, compute capability 8.9 or newer (got {q.device}); use '
            '"int8-int8", or "int8", which leaves values as they are.'
        )
    kernel = gpu.special_title(q.device, "integer attention") or "portable Triton kernel"
    _tell(f'attend computes quant="{quant}" on {q.device} by its {kernel}, where that takes the call.')
    return gpu.integer_forward(q, k, v, call, need_lse, values)


def values_of(quant: str) -> str | None:
    """What a kind of integer attention rounds values and weights to: "fp8", "int8", or None for nothing."""
    return quant.partition("-")[2] or None


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether Triton multiplies FP8 e4m3 on a device, or interprets."""
    if device.type != "cuda":
        return interpreted()
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _tell(line: str) -> None:
    """Cached, so that a line is logged once."""
    logger.info("%s", line)
