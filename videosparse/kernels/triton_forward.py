# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Block-sparse attention in Triton: any length, any strides, dense or by block lists. Imported on first use only.

Shapes
    q, k, v       [B, L, H, D] by strides, contiguous along D; offsets are 64-bit
    out           [B, L, H, D] contiguous
    lse           fp32 [B, H, L], natural log
    row_ptr       int32 [samples * heads * rows + 1], over the samples and heads of the map
    ids, order    int16 or int32 [capacity], int32 [samples * heads * rows + 1], see `BlockIndex`
    lens          int32 [B], where each sample's text ends
    table         int32 [H, 8], see `ordering.axis_table`
Positions [0, video) are video, [text_start, lens[b]) are text, all others are never read. With a token order, out and
lse are written in raster order, row by row.

One program owns one tile of query rows and walks its key tiles. With lists it takes rows in `order`: the long rows of
all samples and heads first, then the others head by head, so that neighbours in time share keys in L2. A query block
may be cut into several tiles of rows and a key block into several tiles of keys: the GPU decides on tiles, the map on
blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.triton_common import (
    FLOOR,
    LISTS,
    LN_2,
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
from videosparse.kernels.triton_far import NO_REACH, REACH, change, raster
from videosparse.layout import ceil_div

SIZES = ["video", "text_start", "length", "rows", "heads", "map_rows", "map_heads", "shares"]


# sizes change from call to call, and lists may start anywhere in a buffer: specialising would compile again and again
@triton.jit(do_not_specialize=LISTS + SIZES + REACH)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_ptr,
    ids_ptr,
    order_ptr,
    lens_ptr,
    table_ptr,
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
    rows,
    heads,
    map_rows,
    map_heads,
    shares,
    scale_log2,
    far_alpha,
    far_window,
    far_first,
    far_seen,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_LENS: tl.constexpr,
    NEED_LSE: tl.constexpr,
    STAGES: tl.constexpr,
    ORDER: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile of query rows: online softmax in base 2 over its key tiles, accumulated in fp32."""
    program = tl.program_id(0)
    parts: tl.constexpr = BLOCK_ROWS // TILE_M
    if SPARSE:
        row, block_row, sample, head = row_of_program(
            order_ptr, program // parts, rows, heads, map_rows, map_heads, shares
        )
    else:
        block_row = (program // parts) % rows
        head = (program // parts) // rows % heads
        sample = (program // parts) // rows // heads
    sample = sample.to(tl.int64)
    head = head.to(tl.int64)
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)

    first = block_row * BLOCK_ROWS + (program % parts) * TILE_M
    q_pos = first + tl.arange(0, TILE_M)
    q_valid = is_token(q_pos, video, text_start, end)
    q = load_rows(q_ptr + sample * stride_qb + head * stride_qh, q_pos, stride_ql, q_valid, HEAD_DIM, HEAD_PAD)
    k_base = k_ptr + sample * stride_kb + head * stride_kh
    v_base = v_ptr + sample * stride_vb + head * stride_vh

    # dense: tiles over the video, then over what its last one leaves of the text; one run where they touch
    video_end = video
    if text_start == video:
        video_end = tl.maximum(video, end)
    video_tiles = tl.cdiv(video_end, TILE_N)
    text_first = tl.maximum(text_start, video_tiles * TILE_N)
    if SPARSE:
        entry = tl.load(row_ptr + row)
        tiles = (tl.load(row_ptr + row + 1) - entry) * (BLOCK_COLS // TILE_N)
    else:
        entry = 0
        tiles = video_tiles + tl.cdiv(tl.maximum(end - text_first, 0), TILE_N)
    # a tile wholly in the gap or in padding has nothing to do
    if (first >= video) & ((first + TILE_M <= text_start) | (first >= end)):
        tiles = 0

    if FAR:
        q_token = q_pos
        if ORDER:
            q_token = raster(table_ptr, head, q_pos, video)
    top = tl.full([TILE_M], FLOOR, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, HEAD_PAD], tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        if SPARSE:
            block = listed(ids_ptr, entry + tile // (BLOCK_COLS // TILE_N))
            start = block * BLOCK_COLS + tile % (BLOCK_COLS // TILE_N) * TILE_N
        else:
            start = tl.where(tile < video_tiles, tile * TILE_N, text_first + (tile - video_tiles) * TILE_N)
        k_pos = start + tl.arange(0, TILE_N)
        k_valid = is_token(k_pos, video, text_start, end)
        k = load_rows(k_base, k_pos, stride_kl, k_valid, HEAD_DIM, HEAD_PAD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = scores * scale_log2 + tl.where(k_valid, 0.0, -float("inf"))[None, :]
        if FAR:
            scores = change(
                scores, q_token, first, first + TILE_M - 1, start, table_ptr, head, video, far_alpha, far_window,
                far_first, far_seen, TILE_N, ORDER,
            )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.math.exp2(scores - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_rows(v_base, k_pos, stride_vl, k_valid, HEAD_DIM, HEAD_PAD)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top

    empty = (total == 0.0) | ~q_valid
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    acc = tl.where(empty[:, None], 0.0, acc)
    dims = tl.arange(0, HEAD_PAD)
    target = q_pos
    if ORDER:
        target = raster(table_ptr, head, q_pos, video)
    out_rows = (sample * length + target) * heads + head
    inside = q_pos < length
    tl.store(
        out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < HEAD_DIM)[None, :],
    )
    if NEED_LSE:
        lse = (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN_2
        lse = tl.where(empty, -float("inf"), lse)
        tl.store(lse_ptr + (sample * heads + head) * length + target, lse, mask=inside)


def choose_tiles(head_dim: int, dtype: torch.dtype, block_rows: int, shared_kb: int) -> Tiles:
    """Tile sizes that neither spill registers nor exceed the shared memory of the card.

    Args:
        head_dim: 8..128.
        dtype: of q, k and v.
        block_rows: query rows of a block, 64 or 128.
        shared_kb: shared memory of one program.
    """
    if dtype == torch.float32:  # exact products without tensor cores; anything larger spills somewhere
        return Tiles(32, 32, 4, 2) if head_dim <= 64 else Tiles(32, 16, 8, 2)
    # list entries take stages of their own: of five, two hold keys beyond those at work
    stages = 5 if shared_kb > 99 else 3 if shared_kb > 64 else 2
    return Tiles(block_rows, 64, 8 if block_rows == 128 else 4, stages)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on checked tensors [B, L, H, D] of the current device.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.
    """
    batch, length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, length) if need_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    lists = call.lists
    tiles = choose_tiles(head_dim, q.dtype, 128 if lists is None else lists.block[0], shared_kb(q.device))
    block = (tiles.rows, tiles.keys) if lists is None else lists.block
    rows = ceil_div(length, block[0])
    map_rows = rows if lists is None else lists.samples * lists.heads * rows
    forward_kernel[(batch * heads * rows * (block[0] // tiles.rows),)](
        q,
        k,
        v,
        out,
        lse,
        None if lists is None else lists.row_ptr,
        None if lists is None else lists.ids,
        None if lists is None else lists.order,
        call.seq_lens,
        call.order,
        *strides_of(q),
        *strides_of(k),
        *strides_of(v),
        call.video,
        call.text_start,
        length,
        rows,
        heads,
        map_rows,
        1 if lists is None else lists.heads,
        batch * heads * rows // map_rows,
        call.scale * LOG2_E,
        *(call.far or NO_REACH),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad(head_dim),
        BLOCK_ROWS=block[0],
        BLOCK_COLS=block[1],
        TILE_M=tiles.rows,
        TILE_N=tiles.keys,
        SPARSE=lists is not None,
        HAS_LENS=call.seq_lens is not None,
        NEED_LSE=need_lse,
        STAGES=tiles.stages,
        ORDER=call.order is not None,
        FAR=call.far is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,
    )
    return out, lse
