# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Gradients of block-sparse attention for Hopper (sm_90): what stock Triton warp-specializes. Half precision.

The formulas, shapes and arguments are those of `triton_backward`. Here tiles arrive by TMA through descriptors that are
made in the kernel, and where a program owns 128 rows, Triton's automatic warp specialization splits it into a producer
and two consumer warpgroups. Found to be necessary for that (Triton 3.6): 4 warps; lse and delta through descriptors of
one dimension and outputs through descriptors, since with plain loads and stores it aborts or returns NaN; one loop
without a branch or a mask in it.

No mask is needed, as long as invalid positions are read as 0:
    rows past the last valid one lie outside the descriptors, which read 0 there and write nothing;
    the gap between video and text, when there is one, is cleared in copies of the inputs;
    an invalid query has level +inf, so its p is 0; an invalid key adds ds * 0 to dq, and its own gradient is discarded.
What remains is that exp2(0 - level) of an invalid key may overflow: it is bounded by 1 like every p.

A forward kernel that was specialized in the same way gave NaN now and then for long videos, and was removed (see "The
Hopper kernels" in CONTRIBUTING.md). These kernels gave no NaN, and the same bits each time, in 44 calls on 75,600 to
291,600 tokens on an H200 (Triton 3.6), nor did their tests show any. That is evidence and no proof, since the cause is
not known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import AttentionCall, Lists
from videosparse.kernels.compiled import compiled
from videosparse.kernels.tma import ALIGNMENT, is_aligned, with_room_for_descriptors
from videosparse.kernels.triton_backward import SIZES, Gradients, arguments, own_tile, prepared
from videosparse.kernels.triton_common import LISTS, Tiles, end_of_text, listed


@triton.jit
def _extent(lens_ptr, sample, video, text_start, length, HAS_LENS: tl.constexpr):
    """One past the last valid position of a sample."""
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)
    return tl.where(end > text_start, end, video)


@triton.jit
def _tokens(
    ptr, sample, stride_b, head, stride_h, extent, stride_l, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Tiles of the tokens of one head: 0 from `extent` on and past HEAD_DIM."""
    return tl.make_tensor_descriptor(
        ptr + sample * stride_b + head * stride_h,
        shape=[extent, HEAD_DIM],
        strides=[stride_l, 1],
        block_shape=[TILE, HEAD_PAD],
    )


@triton.jit
def _numbers(ptr, line, padded, TILE: tl.constexpr):
    """Tiles of one line of level or delta."""
    return tl.make_tensor_descriptor(ptr + line * padded, shape=[padded], strides=[1], block_shape=[TILE])


@triton.jit
def _walk(row_ptr, row, first, extent, BLOCK: tl.constexpr, TILE: tl.constexpr, SPARSE: tl.constexpr):
    """(first list entry, tiles) of the program whose own rows begin at `first`."""
    if SPARSE:
        entry = tl.load(row_ptr + row)
        tiles = (tl.load(row_ptr + row + 1) - entry) * (BLOCK // TILE)
    else:
        entry = 0
        tiles = tl.cdiv(extent, TILE)
    return entry, tl.where(first < extent, tiles, 0)


@triton.jit
def _start_of_tile(tile, ids_ptr, entry, BLOCK: tl.constexpr, TILE: tl.constexpr, SPARSE: tl.constexpr):
    """First position of the tile-th tile that a program walks."""
    if SPARSE:
        return listed(ids_ptr, entry + tile // (BLOCK // TILE)) * BLOCK + tile % (BLOCK // TILE) * TILE
    else:
        return tile * TILE


STRIDES = [f"stride_{x}{d}" for x in "qkvg" for d in "blh"]


# descriptors need no compile-time knowledge of strides: one binary serves every view
@triton.jit(do_not_specialize=LISTS + SIZES + STRIDES)
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
    SPECIALIZE: tl.constexpr,
    BOUND: tl.constexpr,
):
    """dq of one tile of query rows, over its key tiles."""
    row, sample, head, first = own_tile(order_ptr, rows, heads, map_samples, map_heads, BLOCK_ROWS, TILE_M, SPARSE)
    extent = _extent(lens_ptr, sample, video, text_start, length, HAS_LENS)
    entry, tiles = _walk(row_ptr, row, first, extent, BLOCK_COLS, TILE_N, SPARSE)
    q_desc = _tokens(q_ptr, sample, stride_qb, head, stride_qh, extent, stride_ql, HEAD_DIM, HEAD_PAD, TILE_M)
    grad_desc = _tokens(grad_ptr, sample, stride_gb, head, stride_gh, extent, stride_gl, HEAD_DIM, HEAD_PAD, TILE_M)
    k_desc = _tokens(k_ptr, sample, stride_kb, head, stride_kh, extent, stride_kl, HEAD_DIM, HEAD_PAD, TILE_N)
    v_desc = _tokens(v_ptr, sample, stride_vb, head, stride_vh, extent, stride_vl, HEAD_DIM, HEAD_PAD, TILE_N)
    step = heads.to(tl.int64) * HEAD_DIM
    dq_desc = _tokens(dq_ptr, sample, length * step, head, HEAD_DIM, length, step, HEAD_DIM, HEAD_PAD, TILE_M)
    level_desc = _numbers(level_ptr, sample * heads + head, padded, TILE_M)
    delta_desc = _numbers(delta_ptr, sample * heads + head, padded, TILE_M)

    q = q_desc.load([first, 0])
    grad = grad_desc.load([first, 0])
    level = level_desc.load([first])
    delta = delta_desc.load([first])
    dq = tl.zeros([TILE_M, HEAD_PAD], tl.float32)
    for tile in tl.range(0, tiles, warp_specialize=SPECIALIZE, num_stages=STAGES):
        start = _start_of_tile(tile, ids_ptr, entry, BLOCK_COLS, TILE_N, SPARSE)
        k = k_desc.load([start, 0])
        v = v_desc.load([start, 0])
        scores = tl.dot(q, k.T)
        dp = tl.dot(grad, v.T)
        exponent = scores * scale_log2 - level[:, None]
        if BOUND:
            exponent = tl.minimum(exponent, 0.0)
        p = tl.math.exp2(exponent)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    dq_desc.store([first, 0], (dq * scale).to(dq_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=LISTS + SIZES + STRIDES)
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
    SPECIALIZE: tl.constexpr,
):
    """dk and dv of one tile of keys, over the tiles of query rows that read it; rows past `extent` are not written."""
    row, sample, head, first = own_tile(order_ptr, rows, heads, map_samples, map_heads, BLOCK_COLS, TILE_N, SPARSE)
    extent = _extent(lens_ptr, sample, video, text_start, length, HAS_LENS)
    entry, tiles = _walk(row_ptr, row, first, extent, BLOCK_ROWS, TILE_M, SPARSE)
    q_desc = _tokens(q_ptr, sample, stride_qb, head, stride_qh, extent, stride_ql, HEAD_DIM, HEAD_PAD, TILE_M)
    grad_desc = _tokens(grad_ptr, sample, stride_gb, head, stride_gh, extent, stride_gl, HEAD_DIM, HEAD_PAD, TILE_M)
    k_desc = _tokens(k_ptr, sample, stride_kb, head, stride_kh, extent, stride_kl, HEAD_DIM, HEAD_PAD, TILE_N)
    v_desc = _tokens(v_ptr, sample, stride_vb, head, stride_vh, extent, stride_vl, HEAD_DIM, HEAD_PAD, TILE_N)
    step = heads.to(tl.int64) * HEAD_DIM
    dk_desc = _tokens(dk_ptr, sample, length * step, head, HEAD_DIM, extent, step, HEAD_DIM, HEAD_PAD, TILE_N)
    dv_desc = _tokens(dv_ptr, sample, length * step, head, HEAD_DIM, extent, step, HEAD_DIM, HEAD_PAD, TILE_N)
    level_desc = _numbers(level_ptr, sample * heads + head, padded, TILE_M)
    delta_desc = _numbers(delta_ptr, sample * heads + head, padded, TILE_M)

    k = k_desc.load([first, 0])
    v = v_desc.load([first, 0])
    dk = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
    dv = tl.zeros([TILE_N, HEAD_PAD], tl.float32)
    for tile in tl.range(0, tiles, warp_specialize=SPECIALIZE, num_stages=STAGES):
        start = _start_of_tile(tile, ids_ptr, entry, BLOCK_ROWS, TILE_M, SPARSE)
        q = q_desc.load([start, 0])
        grad = grad_desc.load([start, 0])
        scores = tl.dot(k, q.T)
        level = level_desc.load([start])
        delta = delta_desc.load([start])
        p = tl.math.exp2(scores * scale_log2 - level[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv)
        dp = tl.dot(v, grad.T)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    dk_desc.store([first, 0], (dk * scale).to(dk_ptr.dtype.element_ty))
    dv_desc.store([first, 0], dv.to(dv_ptr.dtype.element_ty))


def unsuited(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    by_key: Lists | None,
) -> str | None:
    """What of a call of `backward` these kernels do not take; None when they take all."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"they take float16 and bfloat16 (got {q.dtype})"
    if q.shape[3] * q.element_size() % ALIGNMENT:
        return f"they take heads of whole {ALIGNMENT} bytes (got head_dim {q.shape[3]})"
    return None


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
    """Gradients of the forward of one call that is not empty, on the current device; see `gpu.backward`.

    Inputs that descriptors cannot take, and inputs with a gap between video and text, are copied first.

    Raises:
        CannotCompile: what it says.
    """
    return _gradients(_readable(prepared(grad, grad_lse, q, k, v, out, lse, call, by_key)))


def _gradients(x: Gradients) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv by the kernels of this file."""
    query, key = choose_tiles(x.q.shape[3], (128, 128) if x.call.lists is None else x.call.lists.block)
    dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    # the key kernel writes nothing behind the end of a sample
    make = torch.empty if x.call.seq_lens is None else torch.zeros
    dk, dv = (make(x.q.shape, dtype=x.q.dtype, device=x.q.device) for _ in range(2))
    _launch(query_kernel, (dq,), x, query, BOUND=True)
    _launch(key_kernel, (dk, dv), x, key)
    for grad in (dk, dv):
        grad[:, x.call.video : x.call.text_start] = 0  # empty without a gap
    return dq, dk, dv


@dataclass(frozen=True)
class HopperTiles(Tiles):
    """`Tiles`, and whether a program is split into a producer and two consumers, each with half of its 128 rows."""

    specialize: bool


def choose_tiles(head_dim: int, block: tuple[int, int]) -> tuple[HopperTiles, HopperTiles]:
    """Tiles of the query kernel and of the key kernel: the fastest of those tried on an H200.

    Args:
        head_dim: 8..128.
        block: (query rows, key rows) of a block, each 64 or 128.
    """
    # without specialization, list entries take stages of their own
    plain = HopperTiles(64, 64, 4, 4, False)
    rows, keys = block
    query = key = plain
    if rows == 128:
        query = HopperTiles(128, 128, 4, 2, True) if keys == 128 else HopperTiles(128, 64, 4, 3, True)
    if keys == 128:
        key = HopperTiles(128 if head_dim <= 64 and rows == 128 else 64, 128, 4, 2, True)
    return query, key


def _launch(kernel: Any, outs: tuple[torch.Tensor, ...], x: Gradients, tiles: HopperTiles, **options: bool) -> None:
    """Launch a kernel of this file.

    Raises:
        CannotCompile: what it says.
    """
    programs, positional, constants = arguments(outs, x, tiles)
    constants |= {"HEAD_PAD": 64 if x.q.shape[3] <= 64 else 128, "SPECIALIZE": tiles.specialize, **options}
    lists = x.call.lists if kernel is query_kernel else x.by_key
    key = (x.q.device, x.q.dtype, None if lists is None else lists.ids.dtype, *constants.values())
    with_room_for_descriptors(x.q.device, partial(_start, kernel, key, programs, positional, constants))


def _start(
    kernel: Any, key: tuple[Any, ...], programs: int, positional: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    compiled(kernel, key, *positional, **constants)
    kernel[(programs,)](*positional, **constants)


def _readable(x: Gradients) -> Gradients:
    """The same with inputs that descriptors can read and whose gap is 0."""
    call = x.call
    tensors = (x.q, x.k, x.v, x.grad)
    if call.video < call.text_start:
        position = torch.arange(x.q.shape[1], device=x.q.device)
        token = ((position < call.video) | (position >= call.text_start))[:, None, None]
        q, k, v, grad = (torch.where(token, t, 0).contiguous() for t in tensors)
    else:
        q, k, v, grad = (t if is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors)
    return replace(x, q=q, k=k, v=v, grad=grad)
