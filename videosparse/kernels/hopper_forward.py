"""Launches the Hopper kernel for the calls that it takes. Only `kernels.gpu` imports this, on a GPU of sm_90."""

from __future__ import annotations

from functools import cache

import torch

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_kernel import TAIL_BLOCKS, forward_kernel
from videosparse.kernels.tma import describe, is_aligned
from videosparse.kernels.value_tail import value_tail
from videosparse.layout import ceil_div


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
    if call.lists is not None and call.lists.block[0] != 128:
        return f"it takes blocks of 128 query rows (got {call.lists.block[0]})"
    if batch >= 2**15 or heads >= 2**16 or batch * heads * ceil_div(length, 128) >= 2**31:
        return "it takes fewer than 2^15 samples, 2^16 heads and 2^31 rows of blocks"
    if not (is_aligned(q) and is_aligned(k) and is_aligned(v)):
        return "it takes tensors whose start and strides are multiples of 16 bytes"
    keys = 128 if call.lists is None else call.lists.block[1]
    if has_text(call) and ceil_div(length, keys) - call.video // keys > TAIL_BLOCKS.value:
        return f"it takes up to {TAIL_BLOCKS.value} key blocks of text"
    return None


def has_text(call: AttentionCall) -> bool:
    """Whether some of the positions below the length hold no tokens."""
    return call.seq_lens is not None or call.text_start > call.video


@cache
def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has; every launch asks."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    # Rows are drawn from this. It is made anew by every call, so that nothing is left behind by an aborted launch,
    # and a captured graph sets it to 0 in every replay.
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    rows = ceil_div(length, 128)
    total = batch * heads * rows
    lists = call.lists
    if lists is None:
        keys, row_ptr, ids, order, map_rows, map_heads = 128, counter, counter, counter, total, heads
    else:
        keys, row_ptr, ids, order = lists.block[1], lists.row_ptr, lists.ids, lists.order
        map_rows, map_heads = lists.samples * lists.heads * rows, lists.heads
    v_desc = tail_desc = describe(v, keys, 64)
    text, video, text_start, lens = has_text(call), length, length, counter
    if text:
        video, text_start = call.video, call.text_start
        if call.seq_lens is None:
            lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        else:
            lens = call.seq_lens
        tail_desc = describe(value_tail(v, lens, video // keys * keys, video, text_start), keys, 64)
    arguments = (
        describe(q, 64, head_dim),
        describe(k, keys, 64),
        v_desc,
        tail_desc,
        describe(out, 64, head_dim),
        None if call.order is None else out,
        call.order,
        lse,
        row_ptr,
        ids,
        order,
        lens,
        counter,
        total,
        rows,
        heads,
        map_rows,
        map_heads,
        total // map_rows,
        length,
        video,
        text_start,
        None if call.order is None else call.video,
        call.scale * LOG2_E,
    )
    constants = (keys, head_dim, lists is not None, text, need_lse, call.order is not None)
    key = (device, q.dtype, ids.dtype, constants)
    kernel = compiled(forward_kernel, key, *arguments, *constants, num_warps=4, enable_fp_fusion=True)
    kernel[(min(multiprocessors(device), total), 1, 1)](*arguments, *constants)
    return out, lse
