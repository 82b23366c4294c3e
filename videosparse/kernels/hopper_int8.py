"""Launches integer attention on Hopper, for the calls that it takes. Only `kernels.gpu` imports this, on sm_90."""

from __future__ import annotations

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_forward import has_text, multiprocessors
from videosparse.kernels.hopper_int8_kernel import int8_kernel
from videosparse.kernels.hopper_kernel import TAIL_BLOCKS
from videosparse.kernels.quantize import COPIES, Quantized, quantize
from videosparse.kernels.tma import describe, is_aligned
from videosparse.kernels.value_tail import value_tail
from videosparse.layout import ceil_div

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
    if call.lists is not None and call.lists.block[0] != 128:
        return f"it takes blocks of 128 query rows (got {call.lists.block[0]})"
    if batch >= 2**15 or heads >= 2**16 or batch * heads * ceil_div(length, 128) >= 2**31:
        return "it takes fewer than 2^15 samples, 2^16 heads and 2^31 rows of blocks"
    if values is None and not is_aligned(v):
        return "it takes values whose start and strides are multiples of 16 bytes"
    keys = 128 if call.lists is None else call.lists.block[1]
    if has_text(call) and ceil_div(length, keys) - call.video // keys > TAIL_BLOCKS.value:
        return f"it takes up to {TAIL_BLOCKS.value} key blocks of text"
    return None


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
    # rows are drawn from this; made anew by every call, see `hopper_forward`
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    rows = ceil_div(length, 128)
    total = batch * heads * rows
    lists = call.lists
    if lists is None:
        keys, row_ptr, ids, order, map_rows, map_heads = 128, counter, counter, counter, total, heads
    else:
        keys, row_ptr, ids, order = lists.block[1], lists.row_ptr, lists.ids, lists.order
        map_rows, map_heads = lists.samples * lists.heads * rows, lists.heads
    text, video, text_start, lens = has_text(call), length, length, counter
    if text:
        video, text_start = call.video, call.text_start
        lens = call.seq_lens if call.seq_lens is not None else torch.full_like(counter, length).expand(batch)
        lens = lens.contiguous()
    v_desc = tail_desc = _tiles(data.v, 1, 1, head_dim, keys) if fp8 else describe(data.v, keys, 64)
    if text and not fp8:
        tail_desc = describe(value_tail(data.v, lens, video // keys * keys, video, text_start), keys, 64)
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
    )
    constants = (keys, head_dim, lists is not None, text, fp8, data.lse.numel() > 0)
    key = (device, dtype, data.v.dtype, ids.dtype, constants)
    kernel = compiled(int8_kernel, key, *arguments, *constants, num_warps=4, enable_fp_fusion=True)
    kernel[(min(multiprocessors(device), total), 1, 1)](*arguments, *constants)
    return out, data.lse
