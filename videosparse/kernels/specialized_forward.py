# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Block-sparse attention for Hopper (sm_90) in plain Triton, whose compiler specializes the warps: the second choice.

Taken where the kernel in Gluon does not import or compile. Shapes and lists are those of `triton_forward`; the tricks
that the automatic specialization needs are those of `hopper_backward`: 4 warps, 128 rows, descriptors made in the
kernel for all that is read and written, one loop without a branch in it.

Rows of the output at the end of a sample lie outside the descriptors and are not written, so the outputs are made as
0 and -inf. A key that is no token gets the weight 0 by a selection. Its value must then be finite: past the last token
the descriptors read 0, and the gap between video and text, when there is one, is cleared in a copy of the values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.compiled import compiled
from videosparse.kernels.hopper_backward import _extent, _numbers, _start_of_tile, _tokens, _walk
from videosparse.kernels.tma import is_aligned, with_room_for_descriptors
from videosparse.kernels.triton_backward import PADDED_TO, SIZES, _place
from videosparse.kernels.triton_forward import FLOOR, LISTS, LN_2, _is_token, _strides
from videosparse.layout import ceil_div

BLOCK, HEAD_DIM, STAGES = 128, 128, 2
"""The one configuration that was found right and fast: 128 x 64 with more stages gave NaN on an H200."""


STRIDES = [f"stride_{x}{d}" for x in "qkv" for d in "blh"]


@triton.jit(do_not_specialize=LISTS + SIZES + STRIDES)
def specialized_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_ptr,
    ids_ptr,
    order_ptr,
    lens_ptr,
    stride_qb: tl.int64,
    stride_ql: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kl: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vl: tl.int64,
    stride_vh: tl.int64,
    video,
    text_start,
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
    HAS_LENS: tl.constexpr,
    MASKED: tl.constexpr,
    TEXT: tl.constexpr,
    NEED_LSE: tl.constexpr,
):
    """128 query rows: online softmax in base 2 over tiles of 128 keys, some of which, if MASKED, are no tokens."""
    row, sample, head, first = _place(order_ptr, rows, heads, map_samples, map_heads, BLOCK, BLOCK, SPARSE)
    extent = _extent(lens_ptr, sample, video, text_start, length, HAS_LENS)
    entry, tiles = _walk(row_ptr, row, first, extent, BLOCK, BLOCK, SPARSE)
    q_desc = _tokens(q_ptr, sample, stride_qb, head, stride_qh, extent, stride_ql, HEAD_DIM, HEAD_DIM, BLOCK)
    k_desc = _tokens(k_ptr, sample, stride_kb, head, stride_kh, extent, stride_kl, HEAD_DIM, HEAD_DIM, BLOCK)
    v_desc = _tokens(v_ptr, sample, stride_vb, head, stride_vh, extent, stride_vl, HEAD_DIM, HEAD_DIM, BLOCK)
    step = heads.to(tl.int64) * HEAD_DIM
    out_desc = _tokens(out_ptr, sample, length * step, head, HEAD_DIM, extent, step, HEAD_DIM, HEAD_DIM, BLOCK)

    q = q_desc.load([first, 0])
    top = tl.full([BLOCK], FLOOR, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for tile in tl.range(0, tiles, warp_specialize=True, num_stages=STAGES):
        start = _start_of_tile(tile, ids_ptr, entry, BLOCK, BLOCK, SPARSE)
        scores = tl.dot(q, k_desc.load([start, 0]).T)
        if MASKED:
            position = start + tl.arange(0, BLOCK)
            token = position < extent
            if TEXT:
                token = _is_token(position, video, text_start, extent)
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
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 (got {q.dtype})"
    if q.shape[3] != HEAD_DIM:
        return f"it takes head_dim {HEAD_DIM} (got {q.shape[3]})"
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
    # rows behind the end of a sample are not written
    make = torch.empty if call.seq_lens is None else torch.zeros
    out = make(q.shape, dtype=q.dtype, device=q.device)
    padded = ceil_div(length, PADDED_TO) * PADDED_TO if need_lse else 0
    lse = torch.empty((batch, heads, padded), dtype=torch.float32, device=q.device)
    if out.numel() > 0:
        _launch(q, k, _without_gap(v, call), out, lse, call, need_lse)
    _clear(out, lse, call)
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
    # whether there is a gap before the text depends on the length, which must not choose what is compiled
    text = call.seq_lens is not None or call.text_start > call.video
    arguments = (
        q,
        k,
        v,
        out,
        lse,
        None if lists is None else lists.row_ptr,
        None if lists is None else lists.ids,
        None if lists is None else lists.order,
        call.seq_lens,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        call.video,
        call.text_start,
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
        "HAS_LENS": call.seq_lens is not None,
        "MASKED": text or length % BLOCK != 0,
        "TEXT": text,
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


def _without_gap(v: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The values, 0 between video and text, where they may be NaN."""
    if call.video == call.text_start:
        return v
    position = torch.arange(v.shape[1], device=v.device)
    token = (position < call.video) | (position >= call.text_start)
    return torch.where(token[:, None, None], v, 0).contiguous()


def _clear(out: torch.Tensor, lse: torch.Tensor, call: AttentionCall) -> None:
    """Write the results of rows that are no tokens: the kernel did not, or wrote anything."""
    out[:, call.video : call.text_start] = 0
    lse[..., call.video : call.text_start] = -torch.inf
    if call.seq_lens is not None and lse.numel() > 0:
        position = torch.arange(lse.shape[2], device=lse.device)
        behind = (position >= call.seq_lens[:, None]) & (position >= call.video)
        lse.masked_fill_(behind[:, None], -torch.inf)
