"""Launches integer attention on Hopper, for the calls that it takes. Only `kernels.gpu` imports this, on sm_90."""

from __future__ import annotations

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videosparse.kernels import hopper_work
from videosparse.kernels.call import AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_int8_kernel import int8_kernel
from videosparse.kernels.hopper_work import Work
from videosparse.kernels.quantize import COPIES, Quantized, quantize
from videosparse.kernels.tma import describe, is_aligned

FP8_HEAD_DIMS = (128,)
"""With which head_dim calls with fp8 values are taken. With 64, outputs did not repeat to the bit on an H200, why is
not known; the portable kernel takes those. With 128 and consumers that did not take turns, 19 of 24 calls on 118,952
tokens with text differed from those before, on a GPU that another process kept busy, and none of 25 without it; with
turns 48 calls, 24 of them beside that process, gave the same."""


def unsuited(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, values: str | None
) -> str | None:
    """What of a call on checked tensors [B, L, H, D] this kernel does not take; None when it takes all."""
    batch, length, heads, head_dim = q.shape
    if values == "int8":
        return "it takes no int8 values: Hopper has FP8 for them"
    if values == "fp8" and head_dim not in FP8_HEAD_DIMS:
        return f"it takes fp8 values with head_dim {FP8_HEAD_DIMS[0]} (got {head_dim})"
    if values is None and not is_aligned(v):
        return "it takes values whose start and strides are multiples of 16 bytes"
    return hopper_work.unsuited(call, batch, length, heads)


def _tiles(x: torch.Tensor, *box: int) -> TensorDescriptor:
    """A contiguous tensor for copies of `box`, swizzled by whole rows of it; of floats, as they lie in memory."""
    width = 0 if x.dtype == torch.float32 else box[-1] * x.element_size()
    layout = NVMMASharedLayout(width, x.element_size() * 8, x.dim())
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), layout)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, values: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize tensors [B, L, H, D] of the current device, and launch the kernel on them, if `unsuited` lets them pass.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        CannotCompile: what it says.
    """
    return attend_quantized(quantize(q, k, v, call, need_lse, values, reorder=True), tuple(q.shape), q.dtype, call)


def attend_quantized(
    data: Quantized, shape: tuple[int, ...], dtype: torch.dtype, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on the current device, for a call that `unsuited` lets pass.

    Args:
        data: fp8 values in `quantize.KEY_ORDER`; its lse becomes that of the output.
        shape, dtype: [B, L, H, D] and 16-bit type of the output.

    Returns:
        out and lse fp32 [B, H, L], which is empty where that of `data` is.

    Raises:
        CannotCompile: what it says.
    """
    batch, length, heads, head_dim = shape
    fp8 = data.v_scale is not None
    device = data.q.device
    out = torch.empty(shape, dtype=dtype, device=device)
    work = Work.of(call, batch, length, heads, device)
    keys = work.keys
    v_desc = tail_desc = _tiles(data.v, 1, 1, head_dim, keys) if fp8 else describe(data.v, keys, 64)
    if work.text and not fp8:
        tail_desc = describe(work.tail(data.v), keys, 64)
    arguments = (
        _tiles(data.q, 1, 1, 64, head_dim),
        _tiles(data.q_scale, 1, 1, 64),
        _tiles(data.k, 1, 1, keys, head_dim),
        _tiles(data.k_scale, 1, 1, 1, COPIES),
        v_desc,
        tail_desc,
        describe(out, 64, head_dim),
        data.lse,
        data.q_scale if data.v_scale is None else data.v_scale,
        *work.arguments,
    )
    constants = (keys, head_dim, work.sparse, work.text, fp8, data.lse.numel() > 0)
    key = (device, dtype, data.v.dtype, work.ids.dtype, constants)
    kernel = compiled(int8_kernel, key, *arguments, *constants, num_warps=4, enable_fp_fusion=True)
    kernel[(work.programs, 1, 1)](*arguments, *constants)
    return out, data.lse
