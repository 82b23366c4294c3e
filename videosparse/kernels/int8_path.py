"""Integer attention: what it refuses, and which kernel runs a call."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch

from videosparse.kernels import gpu
from videosparse.kernels.backend import interpreted
from videosparse.kernels.call import AttentionCall

logger = logging.getLogger("videosparse")

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def check(q: torch.Tensor, quant: str, backend: str, need_grad: bool) -> None:
    """Raise unless integer attention takes tensors like q [B, L, H, D].

    Raises:
        NotImplementedError: gradients are needed.
        TypeError: q is not fp16 or bf16.
        ValueError: head_dim is not 64 or 128.
        RuntimeError: backend is a library, none of which is called for integers.
    """
    if need_grad:
        raise NotImplementedError(
            f'quant="{quant}" is for inference: it has no gradient. Use torch.no_grad(), or quant=None in training.'
        )
    if q.dtype not in DTYPES:
        raise TypeError(f'quant="{quant}" takes float16 and bfloat16 (got {q.dtype}); cast q, k and v, or use None.')
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f'quant="{quant}" takes head_dim 64 and 128 (got {q.shape[3]}); use quant=None.')
    if backend in ("fa4", "flex"):
        raise RuntimeError(f'backend="{backend}" has no integer attention here; use "auto", "triton" or "torch".')


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, quant: str, chosen: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer attention of checked tensors [B, L, H, D].

    Args:
        quant: "int8" or "int8-fp8".
        chosen: "triton" or "torch".

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        RuntimeError: quant is "int8-fp8" and the GPU has no FP8 tensor cores.
    """
    fp8 = quant == "int8-fp8"
    if chosen == "torch":
        from videosparse.kernels import torch_int8

        _tell(f'attend computes quant="{quant}" in plain torch on {q.device.type}, which is not faster.')
        return torch_int8.forward(q, k, v, call, need_lse, fp8)
    if q.numel() == 0:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]) if need_lse else (0,), device=q.device)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse.float()
    if fp8 and not _has_fp8(q.device):
        raise RuntimeError(
            f'quant="int8-fp8" needs FP8 tensor cores, compute capability 8.9 or newer (got {q.device}); use "int8".'
        )
    with gpu.on_device(q):
        special = _hopper(q, v, call, fp8)
        if special is not None:
            try:
                return _launch(special, q, k, v, call, need_lse, fp8, reorder=True)
            except special.GluonError as error:
                _failed.add(q.device)
                _warn(f"cannot be compiled: {error}")
        from videosparse.kernels import triton_int8

        return _launch(triton_int8, q, k, v, call, need_lse, fp8, reorder=False)


def _launch(
    kernel: ModuleType,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    need_lse: bool,
    fp8: bool,
    reorder: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from videosparse.kernels.quantize import quantize

    data = quantize(q, k, v, call, need_lse, fp8, reorder)
    return kernel.forward(data, tuple(q.shape), q.dtype, call)  # type: ignore[no-any-return]


_failed: set[torch.device] = set()
"""Devices whose Hopper kernel did not compile."""


@cache
def _has_fp8(device: torch.device) -> bool:
    """Whether Triton multiplies FP8 e4m3 on a device, or interprets."""
    if device.type != "cuda":
        return interpreted()
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _hopper(q: torch.Tensor, v: torch.Tensor, call: AttentionCall, fp8: bool) -> ModuleType | None:
    """The module with the kernel for Hopper, if it runs here and takes the call; else it is said why not."""
    if gpu.portable() or q.device in _failed or gpu.hopper_kernel(q.device) is None:
        return None
    try:
        from videosparse.kernels import hopper_int8
    except Exception as error:
        _failed.add(q.device)
        _warn(f"cannot be imported: {type(error).__name__}: {error}")
        return None
    reason = hopper_int8.unsuited(q, v, call, fp8)
    if reason is not None:
        _tell(f"attend takes its portable Triton kernel for integers instead of the one for Hopper: {reason}.")
        return None
    _tell(f"attend takes its Hopper kernel in Gluon for {'INT8 and FP8' if fp8 else 'INT8'} on {q.device}.")
    return hopper_int8


@cache
def _tell(line: str) -> None:
    """Cached, so that a line is logged once."""
    logger.info("%s", line)


def _warn(what: str) -> None:
    logger.warning(
        "attend takes its portable Triton kernel for integers, which is slower: the one for Hopper %s. Triton 3.6 to "
        "3.9 are known to work.",
        what,
    )
