# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Block-sparse attention for Hopper (sm_90) in plain Triton, whose compiler specializes the warps: the second choice.

Taken where the kernel in Gluon does not import or compile. Shapes and lists are those of `triton_forward`; the tricks
that the automatic specialization needs are those of `hopper_backward`: 4 warps, 128 rows, descriptors made in the
kernel for all that is read and written, one loop without a branch in it.

Video only: a form that masked text passed every small test, and twice gave NaN on an H200 for sequences of 118,800 and
460,800 video tokens. Calls with text go on to the portable kernel. Keys past the last token are read as 0 and get the
weight 0 by a selection.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_backward import _numbers, _start_of_tile, _tokens, _walk
from videosparse.kernels.tma import is_aligned, with_room_for_descriptors
from videosparse.kernels.triton_backward import PADDED_TO, _place
from videosparse.kernels.triton_forward import FLOOR, LN_2, _strides
from videosparse.layout import ceil_div

BLOCK, HEAD_DIM, STAGES = 128, 128, 2
"""The one configuration that was found right and fast: 128 x 64 with more stages gave NaN on an H200."""


# what changes from call to call, and lists, which may start anywhere in a buffer
VARYING = [
    "row_ptr", "ids_ptr", "order_ptr", "length", "padded", "rows", "heads", "map_samples", "map_heads",
    *(f"stride_{x}{d}" for x in "qkv" for d in "blh"),
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def specialized_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_ptr,
    ids_ptr,
    order_ptr,
    stride_qb: tl.int64,
    stride_ql: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kl: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vl: tl.int64,
    stride_vh: tl.int64,
    length,
    padded,
    rows,
    heads,
    map_samples,
    map_heads,
    scale_log2,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    SPARSE: tl.constexpr,
    MASKED: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """128 query rows: online softmax in base 2 over tiles of 128 keys; if MASKED, the last tile is not full."""
    row, sample, head, first = _place(order_ptr, rows, heads, map_samples, map_heads, BLOCK, BLOCK, SPARSE)
    entry, tiles = _walk(row_ptr, row, first, length, BLOCK, BLOCK, SPARSE)
    q_desc = _tokens(q_ptr, sample, stride_qb, head, stride_qh, length, stride_ql, HEAD_DIM, HEAD_DIM, BLOCK)
    k_desc = _tokens(k_ptr, sample, stride_kb, head, stride_kh, length, stride_kl, HEAD_DIM, HEAD_DIM, BLOCK)
    v_desc = _tokens(v_ptr, sample, stride_vb, head, stride_vh, length, stride_vl, HEAD_DIM, HEAD_DIM, BLOCK)
    step = heads.to(tl.int64) * HEAD_DIM
    out_desc = _tokens(out_ptr, sample, length * step, head, HEAD_DIM, length, step, HEAD_DIM, HEAD_DIM, BLOCK)

    q = q_desc.load([first, 0])
    top = tl.full([BLOCK], FLOOR, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for tile in tl.range(0, tiles, warp_specialize=True, num_stages=STAGES):
        start = _start_of_tile(tile, ids_ptr, entry, BLOCK, BLOCK, SPARSE)
        scores = tl.dot(q, k_desc.load([start, 0]).T)
        if MASKED:
            token = start + tl.arange(0, BLOCK) < length
            scores = tl.where(token[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = v_desc.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top

    some = tl.where(total == 0.0, 1.0, total)
    out_desc.store([first, 0], (acc / some[:, None]).to(out_ptr.dtype.element_ty))
    if NEED_LSE:
        lse_desc = _numbers(lse_ptr, sample * heads + head, padded, BLOCK)
        lse_desc.store([first], tl.where(total == 0.0, -float("inf"), (top + tl.math.log2(some)) * LN_2))


def unsuited(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool = False
) -> str | None:
    """What of a call on checked tensors [B, L, H, D] this kernel does not take; None when it takes all."""
    if call.far is not None:
        return "it takes scores as they are (no logit)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 (got {q.dtype})"
    if q.shape[3] != HEAD_DIM:
        return f"it takes head_dim {HEAD_DIM} (got {q.shape[3]})"
    if call.seq_lens is not None or call.text_start > call.video:
        return "it takes video without text"
    if call.order is not None:
        return "it takes calls without a token order"
    if not call.scale > 0:
        return "it takes scales above 0"
    if call.lists is not None and call.lists.block != (BLOCK, BLOCK):
        return f"it takes blocks of (128, 128) (got {call.lists.block})"
    if not (is_aligned(q) and is_aligned(k) and is_aligned(v)):
        return "it takes tensors whose start and strides are multiples of 16 bytes"
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on tensors [B, L, H, D] of the current device, for a call that `unsuited` lets pass.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        CannotCompile: what it says.
    """
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    padded = ceil_div(length, PADDED_TO) * PADDED_TO if need_lse else 0
    lse = torch.empty((batch, heads, padded), dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        _launch(q, k, v, out, lse, call, need_lse)
    return out, lse[..., :length].contiguous() if need_lse else lse.flatten()


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    need_lse: bool,
) -> None:
    batch, length, heads, _ = q.shape
    lists, rows = call.lists, ceil_div(length, BLOCK)
    arguments = (
        q,
        k,
        v,
        out,
        lse,
        None if lists is None else lists.row_ptr,
        None if lists is None else lists.ids,
        None if lists is None else lists.order,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        length,
        lse.shape[2],
        rows,
        heads,
        1 if lists is None else lists.samples,
        1 if lists is None else lists.heads,
        call.scale * LOG2_E,
    )
    constants = {
        "BLOCK": BLOCK,
        "HEAD_DIM": HEAD_DIM,
        "STAGES": STAGES,
        "SPARSE": lists is not None,
        "MASKED": length % BLOCK != 0,
        "NEED_LSE": need_lse,
        "num_warps": 4,
        "num_stages": STAGES,
        "enable_fp_fusion": True,
    }
    key = (q.device, q.dtype, *constants.values())
    start = partial(_start, key, batch * heads * rows, arguments, constants)
    with_room_for_descriptors(q.device, start)


def _start(key: tuple[Any, ...], programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    compiled(specialized_kernel, key, *arguments, **constants)
    specialized_kernel[(programs,)](*arguments, **constants)
