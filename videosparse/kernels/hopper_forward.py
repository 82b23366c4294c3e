"""Launches the Hopper kernel for the calls that it takes. Only `kernels.gpu` imports this, on a GPU of sm_90."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.hopper_kernel import TAIL_BLOCKS, forward_kernel
from videosparse.kernels.value_tail import value_tail
from videosparse.layout import ceil_div

LOG2_E = 1.4426950408889634


class GluonError(RuntimeError):
    """The kernel does not compile: Gluon, which is experimental, is not what it was."""


def unsuited(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> str | None:
    """What of a call on checked tensors [B, L, H, D] this kernel does not take; None when it takes all."""
    batch, length, heads, head_dim = q.shape
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
    if not (_is_aligned(q) and _is_aligned(k) and _is_aligned(v)):
        return "it takes tensors whose start and strides are multiples of 16 bytes"
    keys = 128 if call.lists is None else call.lists.block[1]
    if _has_text(call) and ceil_div(length, keys) - call.video // keys > TAIL_BLOCKS.value:
        return f"it takes up to {TAIL_BLOCKS.value} key blocks of text"
    return None


def _has_text(call: AttentionCall) -> bool:
    """Whether some of the positions below the length hold no tokens."""
    return call.seq_lens is not None or call.text_start > call.video


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether the copy engine reads a tensor [B, L, H, D] of 16-bit elements. The stride of a size of 1 is not used."""
    sizes, strides = x.shape, x.stride()
    return x.data_ptr() % 16 == 0 and all(sizes[i] == 1 or (strides[i] > 0 and strides[i] % 8 == 0) for i in (0, 1, 2))


@cache
def _swizzled() -> NVMMASharedLayout:
    return NVMMASharedLayout(128, 16, 4)


def _describe(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A tensor [B, L, H, D] for copies of [rows, columns] of one head."""
    batch, length, heads, head_dim = x.shape
    by_batch, by_token, by_head = (
        n if size > 1 else head_dim for n, size in zip(x.stride()[:3], x.shape, strict=False)
    )
    shape, strides = [batch, heads, length, head_dim], [by_batch, by_head, by_token, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, rows, columns], _swizzled())


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_compiled: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by device, dtype and constants: a launch through them does not look at its arguments again."""


def _kernel(device: torch.device, dtype: torch.dtype, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    """The compiled kernel, loaded on the current device.

    Raises:
        GluonError: it does not compile or does not load.
    """
    key = (device, dtype, constants)
    kernel = _compiled.get(key)
    if kernel is None:
        try:
            kernel = forward_kernel.warmup(*arguments, *constants, grid=(1,), num_warps=4, enable_fp_fusion=True)
            kernel[(1, 1, 1)]  # loads it, and launches nothing
        except Exception as error:
            if torch.cuda.is_current_stream_capturing():  # which may forbid loading: that says nothing about Gluon
                raise
            raise GluonError(f"{type(error).__name__}: {str(error).strip()[-300:]}") from error
        _compiled[key] = kernel
    return kernel


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on tensors [B, L, H, D] of the current device, for a call that `unsuited` lets pass.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        GluonError: the kernel does not compile here.
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
    v_desc = tail_desc = _describe(v, keys, 64)
    text, video, text_start, lens = _has_text(call), length, length, counter
    if text:
        video, text_start = call.video, call.text_start
        if call.seq_lens is None:
            lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        else:
            lens = call.seq_lens
        tail_desc = _describe(value_tail(v, lens, video // keys * keys, video, text_start), keys, 64)
    arguments = (
        _describe(q, 64, head_dim),
        _describe(k, keys, 64),
        v_desc,
        tail_desc,
        _describe(out, 64, head_dim),
        out,
        counter if call.order is None else call.order,
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
        call.video,
        call.scale * LOG2_E,
    )
    constants = (keys, head_dim, lists is not None, text, need_lse, call.order is not None)
    kernel = _kernel(device, q.dtype, arguments, constants)
    kernel[(min(_multiprocessors(device), total), 1, 1)](*arguments, *constants)
    return out, lse
