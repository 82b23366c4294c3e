# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gradients of block-sparse attention in Triton, on any GPU of ours. Imported on first use only.

Shapes
    q, k, v, grad_out     [B, L, H, D] by strides, contiguous along D; offsets are 64-bit
    dq, dk, dv            [B, L, H, D] contiguous
    level, delta          fp32 [B, H, padded], padded = L rounded up to 128
    row_ptr, ids, order   of the query-major lists for dq, of the key-major lists for dk and dv; see `Lists`
    lens                  int32 [B], where each sample's text ends
Valid positions are those of `triton_forward`; the others get gradient 0, whatever they hold.

With p = exp(score - lse), the probabilities, and delta = sum(out * grad_out) - grad_lse, row by row:
    dv = p^T grad_out        ds = p * (grad_out v^T - delta)        dq = scale * ds k        dk = scale * ds^T q
(FlashAttention-2, arXiv 2307.08691, algorithm 2; the gradient of lse enters through delta.) Two kernels compute p
twice, so that nothing is added across programs: no atomics, and equal inputs give equal bits.

`level` is lse, +inf where a row is no valid token or reads no key: its p is then exactly 0. It is in base 2 for half
precision. For float32 that would round lse a second time, which all p of a row would share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E, AttentionCall, Lists
from videosparse.kernels.triton_common import (
    LISTS,
    LOG2_E_IN_KERNEL,
    Tiles,
    end_of_text,
    head_pad,
    is_token,
    listed,
    load_rows,
    row_of_program,
    shared_kb,
    strides_of,
)
from videosparse.layout import ceil_div

SIZES = ["video", "text_start", "length", "padded", "rows", "heads", "map_samples", "map_heads"]
PADDED_TO = 128
"""`level` and `delta` have room for whole tiles of every size."""


@triton.jit(do_not_specialize=["lens_ptr", "video", "text_start", "length", "padded", "heads"])
def prepare_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    level_ptr,
    delta_ptr,
    lens_ptr,
    stride_ob: tl.int64,
    stride_ol: tl.int64,
    stride_oh: tl.int64,
    stride_gb: tl.int64,
    stride_gl: tl.int64,
    stride_gh: tl.int64,
    video,
    text_start,
    length,
    padded,
    heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LENS: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    """level and delta of one tile of rows of one head."""
    tiles = padded // TILE
    start = (tl.program_id(0) % tiles) * TILE
    line = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = line // heads, line % heads
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)
    position = start + tl.arange(0, TILE)
    valid = is_token(position, video, text_start, end)
    lse = tl.load(lse_ptr + line * length + position, mask=valid, other=-float("inf"))
    valid = valid & (lse > -float("inf"))
    out = load_rows(out_ptr + sample * stride_ob + head * stride_oh, position, stride_ol, valid, HEAD_DIM, HEAD_PAD)
    grad = load_rows(grad_ptr + sample * stride_gb + head * stride_gh, position, stride_gl, valid, HEAD_DIM, HEAD_PAD)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + line * length + position, mask=valid, other=0.0)
    at = line * padded + position
    if grad_ptr.dtype.element_ty != tl.float32:
        lse = lse * LOG2_E_IN_KERNEL
    tl.store(level_ptr + at, tl.where(valid, lse, float("inf")))
    tl.store(delta_ptr + at, delta)


@triton.jit
def _probabilities(products, level, scale, scale_log2, EXACT: tl.constexpr):
    """exp(scale * products - lse), with level as the top of this file says; EXACT for float32."""
    if EXACT:
        return tl.math.exp2((products * scale - level) * LOG2_E_IN_KERNEL)
    else:
        return tl.math.exp2(products * scale_log2 - level)


@triton.jit
def _start_of_tile(
    tile,
    ids_ptr,
    entry,
    video_tiles,
    text_start,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """First position of the tile-th tile that a program walks: of listed blocks, or of the video and then
    what its last tile leaves of the text."""
    if SPARSE:
        start = listed(ids_ptr, entry + tile // (BLOCK // TILE)) * BLOCK + tile % (BLOCK // TILE) * TILE
    else:
        text_first = tl.maximum(text_start, video_tiles * TILE)
        start = tl.where(tile < video_tiles, tile * TILE, text_first + (tile - video_tiles) * TILE)
    return start


@triton.jit
def _walk(
    row_ptr,
    row,
    video,
    text_start,
    end,
    first,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """(first list entry, tiles, how many of them are video) of the program that owns [first, first + OWN)."""
    video_end = video
    if text_start == video:
        video_end = tl.maximum(video, end)
    video_tiles = tl.cdiv(video_end, TILE)
    if SPARSE:
        entry = tl.load(row_ptr + row)
        tiles = (tl.load(row_ptr + row + 1) - entry) * (BLOCK // TILE)
    else:
        entry = 0
        tiles = video_tiles + tl.cdiv(tl.maximum(end - tl.maximum(text_start, video_tiles * TILE), 0), TILE)
    # a program wholly in the gap or in padding has nothing to do
    if (first >= video) & ((first + OWN <= text_start) | (first >= end)):
        tiles = 0
    return entry, tiles, video_tiles


@triton.jit
def own_tile(
    order_ptr, rows, heads, map_samples, map_heads, BLOCK: tl.constexpr, TILE: tl.constexpr, SPARSE: tl.constexpr
):
    """(row of the lists, sample, head, first position of its own) of this program, which owns one tile."""
    parts: tl.constexpr = BLOCK // TILE
    slot = tl.program_id(0) // parts
    if SPARSE:
        map_rows = map_samples * map_heads * rows
        shares = tl.num_programs(0) // parts // map_rows
        row, block_row, sample, head = row_of_program(order_ptr, slot, rows, heads, map_rows, map_heads, shares)
    else:
        row = slot  # of no list
        block_row = slot % rows
        head = slot // rows % heads
        sample = slot // rows // heads
    first = block_row * BLOCK + tl.program_id(0) % parts * TILE
    return row, sample.to(tl.int64), head.to(tl.int64), first


@triton.jit
def _store_rows(ptr, x, sample, position, head, length, heads, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Write x [positions, HEAD_PAD] to one head of a contiguous [B, L, H, D]."""
    dims = tl.arange(0, HEAD_PAD)
    rows = (sample * length + position) * heads + head
    tl.store(
        ptr + rows[:, None] * HEAD_DIM + dims[None, :],
        x.to(ptr.dtype.element_ty),
        mask=(position < length)[:, None] & (dims < HEAD_DIM)[None, :],
    )


# as in the forward: sizes change from call to call, and lists may start anywhere in a buffer
@triton.jit(do_not_specialize=LISTS + SIZES)
def query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    dq_ptr,
    level_ptr,
    delta_ptr,
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
    stride_gb: tl.int64,
    stride_gl: tl.int64,
    stride_gh: tl.int64,
    video,
    text_start,
    length,
    padded,
    rows,
    heads,
    map_samples,
    map_heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_LENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq of one tile of query rows, over its key tiles."""
    row, sample, head, first = own_tile(order_ptr, rows, heads, map_samples, map_heads, BLOCK_ROWS, TILE_M, SPARSE)
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)
    entry, tiles, video_tiles = _walk(row_ptr, row, video, text_start, end, first, TILE_M, BLOCK_COLS, TILE_N, SPARSE)
    q_pos = first + tl.arange(0, TILE_M)
    q_valid = is_token(q_pos, video, text_start, end)
    q = load_rows(q_ptr + sample * stride_qb + head * stride_qh, q_pos, stride_ql, q_valid, HEAD_DIM, HEAD_PAD)
    grad = load_rows(grad_ptr + sample * stride_gb + head * stride_gh, q_pos, stride_gl, q_valid, HEAD_DIM, HEAD_PAD)
    line = (sample * heads + head) * padded
    level = tl.load(level_ptr + line + q_pos, mask=q_valid, other=float("inf"))
    delta = tl.load(delta_ptr + line + q_pos, mask=q_valid, other=0.0)
    k_base = k_ptr + sample * stride_kb + head * stride_kh
    v_base = v_ptr + sample * stride_vb + head * stride_vh

    dq = tl.zeros([TILE_M, HEAD_PAD], tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = _start_of_tile(tile, ids_ptr, entry, video_tiles, text_start, BLOCK_COLS, TILE_N, SPARSE)
        k_pos = start + tl.arange(0, TILE_N)
        k_valid = is_token(k_pos, video, text_start, end)
        k = load_rows(k_base, k_pos, stride_kl, k_valid, HEAD_DIM, HEAD_PAD)
        v = load_rows(v_base, k_pos, stride_vl, k_valid, HEAD_DIM, HEAD_PAD)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        levels = level[:, None] + tl.where(k_valid, 0.0, float("inf"))[None, :]
        p = _probabilities(products, levels, scale, scale_log2, q.dtype == tl.float32)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store_rows(dq_ptr, dq * scale, sample, q_pos, head, length, heads, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=LISTS + SIZES)
def key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    dk_ptr,
    dv_ptr,
    level_ptr,
    delta_ptr,
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
    stride_gb: tl.int64,
    stride_gl: tl.int64,
    stride_gh: tl.int64,
    video,
    text_start,
    length,
    padded,
    rows,
    heads,
    map_samples,
    map_heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_LENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of one tile of keys, over the tiles of query rows that read it; scores are [keys, queries] here."""
    row, sample, head, first = own_tile(order_ptr, rows, heads, map_samples, map_heads, BLOCK_COLS, TILE_N, SPARSE)
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)
    entry, tiles, video_tiles = _walk(row_ptr, row, video, text_start, end, first, TILE_N, BLOCK_ROWS, TILE_M, SPARSE)
    k_pos = first + tl.arange(0, TILE_N)
    k_valid = is_token(k_pos, video, text_start, end)
    k = load_rows(k_ptr + sample * stride_kb + head * stride_kh, k_pos, stride_kl, k_valid, HEAD_DIM, HEAD_PAD)
    v = load_rows(v_ptr + sample * stride_vb + head * stride_vh, k_pos, stride_vl, k_valid, HEAD_DIM, HEAD_PAD)
    q_base = q_ptr + sample * stride_qb + head * stride_qh
    grad_base = grad_ptr + sample * stride_gb + head * stride_gh
    line = (sample * heads + head) * padded

    dk = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
    dv = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = _start_of_tile(tile, ids_ptr, entry, video_tiles, text_start, BLOCK_ROWS, TILE_M, SPARSE)
        q_pos = start + tl.arange(0, TILE_M)
        q_valid = is_token(q_pos, video, text_start, end)
        q = load_rows(q_base, q_pos, stride_ql, q_valid, HEAD_DIM, HEAD_PAD)
        grad = load_rows(grad_base, q_pos, stride_gl, q_valid, HEAD_DIM, HEAD_PAD)
        level = tl.load(level_ptr + line + q_pos, mask=q_valid, other=float("inf"))
        delta = tl.load(delta_ptr + line + q_pos, mask=q_valid, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = _probabilities(products, level[None, :], scale, scale_log2, q.dtype == tl.float32)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # a key that is no valid token was read as 0, which has a score of its own: its row means nothing
    dk = tl.where(k_valid[:, None], dk * scale, 0.0)
    dv = tl.where(k_valid[:, None], dv, 0.0)
    _store_rows(dk_ptr, dk, sample, k_pos, head, length, heads, HEAD_DIM, HEAD_PAD)
    _store_rows(dv_ptr, dv, sample, k_pos, head, length, heads, HEAD_DIM, HEAD_PAD)


@dataclass(frozen=True, eq=False)
class Gradients:
    """What both kernels read.

    Args:
        q, k, v, grad: [B, L, H, D], grad that of the output.
        level, delta: fp32 [B, H, padded]; see the top of this file.
        call: geometry, and the query-major lists.
        by_key: the key-major lists of the same map, whose block is (key rows, query rows); None without lists.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    level: torch.Tensor
    delta: torch.Tensor
    call: AttentionCall
    by_key: Lists | None


def choose_tiles(
    head_dim: int, dtype: torch.dtype, block: tuple[int, int], shared_kb: int, *, sparse: bool = True
) -> tuple[Tiles, Tiles]:
    """Tiles of the query kernel and of the key kernel that neither spill registers nor exceed the shared memory.

    Args:
        head_dim: 8..128.
        dtype: of q, k and v.
        block: (query rows, key rows) of a block, each 64 or 128.
        shared_kb: shared memory of one program.
        sparse: whether lists are read; as in the forward, their entries take stages of their own.
    """
    if dtype == torch.float32:
        return (Tiles(32, 32, 4 if head_dim <= 64 else 8, 2),) * 2
    if shared_kb <= 64:
        return Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)
    few, many = (3, 5) if sparse else (2, 3)
    if head_dim > 64:
        return Tiles(64, 64, 4, few), Tiles(64, 64, 8, many if shared_kb > 99 else few)
    warps = {64: 4, 128: 8}
    return Tiles(block[0], 64, warps[block[0]], many), Tiles(32, block[1], warps[block[1]], many)


def prepare(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """level and delta, fp32 [B, H, L rounded up to 128].

    Args:
        grad, out: [B, L, H, D].
        grad_lse, lse: fp32 [B, H, L] contiguous; grad_lse None when lse took no part.
    """
    batch, length, heads, head_dim = out.shape
    padded = ceil_div(length, PADDED_TO) * PADDED_TO
    level, delta = (torch.empty((batch, heads, padded), dtype=torch.float32, device=out.device) for _ in range(2))
    prepare_kernel[(batch * heads * (padded // 64),)](
        out,
        grad,
        lse,
        grad_lse,
        level,
        delta,
        call.seq_lens,
        *strides_of(out),
        *strides_of(grad),
        call.video,
        call.text_start,
        length,
        padded,
        heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad(head_dim),
        TILE=64,
        HAS_LENS=call.seq_lens is not None,
        HAS_GRAD_LSE=grad_lse is not None,
    )
    return level, delta


def arguments(
    outs: tuple[torch.Tensor, ...], x: Gradients, tiles: Tiles
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """What the kernels of this file and those of `hopper_backward` are launched with.

    Args:
        outs: dq for a query kernel, dk and dv for a key kernel.
        tiles: how one program works.

    Returns:
        The number of programs, arguments by place, and compile-time arguments.
    """
    batch, length, heads, head_dim = x.q.shape
    by_query = len(outs) == 1
    lists = x.call.lists if by_query else x.by_key
    block, own = (tiles.rows, tiles.keys), tiles.rows if by_query else tiles.keys
    if lists is not None:
        block = lists.block if by_query else lists.block[::-1]
    own_block = block[0] if by_query else block[1]
    rows = ceil_div(length, own_block)
    positional = (
        x.q,
        x.k,
        x.v,
        x.grad,
        *outs,
        x.level,
        x.delta,
        None if lists is None else lists.row_ptr,
        None if lists is None else lists.ids,
        None if lists is None else lists.order,
        x.call.seq_lens,
        *strides_of(x.q),
        *strides_of(x.k),
        *strides_of(x.v),
        *strides_of(x.grad),
        x.call.video,
        x.call.text_start,
        length,
        x.level.shape[2],
        rows,
        heads,
        1 if lists is None else lists.samples,
        1 if lists is None else lists.heads,
        x.call.scale,
        x.call.scale * LOG2_E,
    )
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_PAD": head_pad(head_dim),
        "BLOCK_ROWS": block[0],
        "BLOCK_COLS": block[1],
        "TILE_M": tiles.rows,
        "TILE_N": tiles.keys,
        "SPARSE": lists is not None,
        "HAS_LENS": x.call.seq_lens is not None,
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }
    return batch * heads * rows * (own_block // own), positional, constants


def _launch(kernel: Any, outs: tuple[torch.Tensor, ...], x: Gradients, tiles: Tiles) -> None:
    programs, positional, constants = arguments(outs, x, tiles)
    kernel[(programs,)](*positional, **constants)


def _gradients(x: Gradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv by the kernels of this file."""
    block = (128, 128) if x.call.lists is None else x.call.lists.block
    sparse = x.call.lists is not None
    by_query, by_key = choose_tiles(x.q.shape[3], x.q.dtype, block, shared_kb(x.q.device), sparse=sparse)
    dq, dk, dv = (torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device) for _ in range(3))
    _launch(query_kernel, (dq,), x, by_query)
    _launch(key_kernel, (dk, dv), x, by_key)
    return dq, dk, dv


def prepared(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    by_key: Lists | None,
) -> Gradients:
    """What both kernels read, from the arguments of `backward`."""
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    level, delta = prepare(grad, grad_lse, out, lse.contiguous(), call)
    return Gradients(q, k, v, grad, level, delta, call, by_key)


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    by_key: Lists | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the forward of one call that is not empty, on the current device; see `gpu.backward`."""
    return _gradients(prepared(grad, grad_lse, q, k, v, out, lse, call, by_key))
