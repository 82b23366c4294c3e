"""Launches the Hopper kernel for the calls that it takes. Only `kernels.gpu` imports this, on a GPU of sm_90."""

from __future__ import annotations

import torch

from videosparse.kernels import hopper_work
from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_kernel import forward_kernel
from videosparse.kernels.hopper_work import Work
from videosparse.kernels.tma import describe, is_aligned


def unsuited(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool = False
) -> str | None:
    """What of a call on checked tensors [B, L, H, D] this kernel does not take; None when it takes all."""
    batch, length, heads, head_dim = q.shape
    if call.far is not None:
        return "it takes scores as they are (no logit)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 (got {q.dtype})"
    if head_dim not in (64, 128):
        return f"it takes head_dim 64 and 128 (got {head_dim})"
    if not call.scale > 0:
        return "it takes scales above 0"
    if not (is_aligned(q) and is_aligned(k) and is_aligned(v)):
        return "it takes tensors whose start and strides are multiples of 16 bytes"
    return hopper_work.unsuited(call, batch, length, heads)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on tensors [B, L, H, D] of the current device, for a call that `unsuited` lets pass.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        CannotCompile: what it says.
    """
    batch, length, heads, head_dim = q.shape
    device = q.device
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty((batch, heads, length) if need_lse else (0,), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out, lse
    work = Work.of(call, batch, length, heads, device)
    v_desc = describe(v, work.keys, 64)
    arguments = (
        describe(q, 64, head_dim),
        describe(k, work.keys, 64),
        v_desc,
        describe(work.tail(v), work.keys, 64) if work.text else v_desc,
        describe(out, 64, head_dim),
        None if call.order is None else out,
        call.order,
        lse,
        *work.arguments,
        None if call.order is None else call.video,
        call.scale * LOG2_E,
    )
    constants = (work.keys, head_dim, work.sparse, work.text, need_lse, call.order is not None)
    key = (device, q.dtype, work.ids.dtype, constants)
    kernel = compiled(forward_kernel, key, *arguments, *constants, num_warps=4, enable_fp_fusion=True)
    kernel[(work.programs, 1, 1)](*arguments, *constants)
    return out, lse
