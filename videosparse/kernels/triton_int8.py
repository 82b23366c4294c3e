# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Integer attention in Triton for any card that has INT8 tensor cores. Imported on first use only.

Shapes are those of `quantize`, lists and work those of `triton_forward`; values are fp16 or bf16 by strides, or fp8 or
int8 turned, in their own order. Scores are exact int32 sums, made floats by the scales of their row and of their 64
keys. Products with fp8 values keep about 14 bits on Hopper, so those of each tile are added in fp32.

Weights for int8 values are integers of 0..127 relative to the largest of their row in this tile. Relative to the
largest so far they would leave nothing of rows whose scores differ little but for one (19 % error against 1.4 % where
one key is eight times as large). Products are exact int32 sums; those of a tile enter by that largest weight and the
values' scales. The row's sum is that of exact weights, and so is the lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.quantize import COPIES, ROUND, SCALED_KEYS, Quantized, quantize
from videosparse.kernels.triton_common import (
    FLOOR,
    LISTS,
    LN_2,
    Tiles,
    end_of_text,
    is_token,
    listed,
    load_rows,
    row_of_program,
    shared_kb,
    strides_of,
)
from videosparse.layout import ceil_div

INT8_PEAK = tl.constexpr(6.988684686772166)  # log2(127): int8 weights are at most 127
PEAK = tl.constexpr(8.0)  # fp8 weights are at most 2^8: as far above e4m3's smallest as it goes in powers of two
SIZES = ["video", "text_start", "length", "padded", "rows", "heads", "map_rows", "map_heads", "shares"]


# nothing is specialised, as in triton_forward
@triton.jit(do_not_specialize=LISTS + SIZES)
def int8_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    out_ptr,
    lse_ptr,
    row_ptr,
    ids_ptr,
    order_ptr,
    lens_ptr,
    stride_vb: tl.int64,
    stride_vl: tl.int64,
    stride_vh: tl.int64,
    video,
    text_start,
    length,
    padded,
    rows,
    heads,
    map_rows,
    map_heads,
    shares,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_N: tl.constexpr,
    SCALED: tl.constexpr,
    COPIES: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_LENS: tl.constexpr,
    FP8: tl.constexpr,
    INT8: tl.constexpr,
    NEED_LSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of query rows: online softmax in base 2 over tiles of TILE_N keys, one or more for each scale."""
    program = tl.program_id(0)
    if SPARSE:
        row, block_row, sample, head = row_of_program(order_ptr, program, rows, heads, map_rows, map_heads, shares)
    else:
        block_row = program % rows
        head = program // rows % heads
        sample = program // rows // heads
    line = (sample * heads + head).to(tl.int64)
    sample = sample.to(tl.int64)
    head = head.to(tl.int64)
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)

    first = block_row * BLOCK_ROWS
    q_pos = first + tl.arange(0, BLOCK_ROWS)
    q_valid = is_token(q_pos, video, text_start, end)
    dims = tl.arange(0, HEAD_DIM)
    q_rows = line * padded + q_pos
    q = tl.load(q_ptr + q_rows[:, None] * HEAD_DIM + dims[None, :])
    q_scale = tl.load(q_scale_ptr + q_rows)
    k_base = k_ptr + line * padded * HEAD_DIM
    k_scale_base = k_scale_ptr + line * (padded // SCALED) * COPIES
    v_base = v_ptr + sample * stride_vb + head * stride_vh
    if FP8 or INT8:
        v_base = v_ptr + line * HEAD_DIM * padded
    if INT8:
        v_scale_base = v_scale_ptr + line * (padded // SCALED) * HEAD_DIM

    # dense: tiles over the video, then those of the text that are not among them
    video_tiles = tl.cdiv(video, TILE_N)
    text_tile = tl.maximum(text_start // TILE_N, video_tiles)
    if SPARSE:
        entry = tl.load(row_ptr + row)
        tiles = (tl.load(row_ptr + row + 1) - entry) * (BLOCK_COLS // TILE_N)
    else:
        entry = 0
        text_tiles = tl.maximum(tl.cdiv(end, TILE_N) - text_tile, 0)
        tiles = video_tiles + tl.where(end > text_start, text_tiles, 0)
    # a tile wholly in the gap or in padding has nothing to do
    if (first >= video) & ((first + BLOCK_ROWS <= text_start) | (first >= end)):
        tiles = 0

    top = tl.full([BLOCK_ROWS], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    for i in tl.range(0, tiles, num_stages=STAGES):
        if SPARSE:
            block = listed(ids_ptr, entry + i // (BLOCK_COLS // TILE_N))
            tile = block * (BLOCK_COLS // TILE_N) + i % (BLOCK_COLS // TILE_N)
        else:
            tile = tl.where(i < video_tiles, i, text_tile + i - video_tiles)
        k_pos = tile * TILE_N + tl.arange(0, TILE_N)
        k_valid = is_token(k_pos, video, text_start, end)
        # rows up to the padded length exist and hold 0 where no token is
        k = tl.load(k_base + k_pos.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :])
        scale = q_scale * tl.load(k_scale_base + tile // (SCALED // TILE_N) * COPIES)
        scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        scores = scores * scale[:, None] + tl.where(k_valid, 0.0, -float("inf"))[None, :]
        level = tl.maximum(tl.max(scores, 1), FLOOR)
        new_top = tl.maximum(top, level)
        shrink = tl.math.exp2(top - new_top)
        if INT8:
            p = tl.math.exp2(scores - (level - INT8_PEAK)[:, None])
            weights = (p + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
            v = tl.load(v_base + dims.to(tl.int64)[:, None] * padded + k_pos[None, :])
            found = tl.dot(weights, tl.trans(v), out_dtype=tl.int32).to(tl.float32)
            v_scale = tl.load(v_scale_base + tile // (SCALED // TILE_N) * HEAD_DIM + dims)
            share = tl.math.exp2(level - new_top)
            acc = acc * shrink[:, None] + found * (share[:, None] * v_scale[None, :])
            total = total * shrink + tl.sum(p, 1) * share
        elif FP8:
            p = tl.math.exp2(scores - (new_top - PEAK)[:, None])
            v = tl.load(v_base + dims.to(tl.int64)[:, None] * padded + k_pos[None, :])
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), tl.trans(v))
            total = total * shrink + tl.sum(p, 1)
        else:
            p = tl.math.exp2(scores - new_top[:, None])
            v = load_rows(v_base, k_pos, stride_vl, k_valid, HEAD_DIM, HEAD_DIM)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
            total = total * shrink + tl.sum(p, 1)
        top = new_top

    empty = (total == 0.0) | ~q_valid
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if FP8:
        acc = acc * tl.load(v_scale_ptr + line * HEAD_DIM + dims)[None, :]
    acc = tl.where(empty[:, None], 0.0, acc)
    out_rows = (sample * length + q_pos) * heads + head
    inside = q_pos < length
    tl.store(
        out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None],
    )
    if NEED_LSE:
        place = lse_ptr + line * length + q_pos
        if FP8:
            top -= PEAK
        if INT8:
            top -= INT8_PEAK
        lse = (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN_2 + tl.load(place, mask=inside, other=0.0)
        tl.store(place, tl.where(empty, -float("inf"), lse), mask=inside)


def choose_tiles(head_dim: int, block_rows: int, shared_kb: int, turned: bool) -> Tiles:
    """Tile sizes that neither spill registers nor exceed the shared memory of the card; tiles are whole blocks."""
    stages = 5 if shared_kb > 99 else 3 if shared_kb > 64 else 2
    if turned and head_dim > 64:  # fp8 or int8 values: two sets of accumulators
        return Tiles(block_rows, 32, 8, stages)
    return Tiles(block_rows, SCALED_KEYS, 8 if block_rows == 128 else 4, stages)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, values: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize checked tensors [B, L, H, D] of the current device, fp16 or bf16, and launch the kernel on them.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.
    """
    return attend_quantized(quantize(q, k, v, call, need_lse, values, reorder=False), tuple(q.shape), q.dtype, call)


def attend_quantized(
    data: Quantized, shape: tuple[int, ...], dtype: torch.dtype, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on the current device.

    Args:
        data: fp8 or int8 values in their own order; its lse becomes that of the output.
        shape, dtype: [B, L, H, D] and 16-bit type of the output.

    Returns:
        out and lse fp32 [B, H, L], which is empty where that of `data` is.
    """
    batch, length, heads, head_dim = shape
    out = torch.empty(shape, dtype=dtype, device=data.q.device)
    lists = call.lists
    block = (128, SCALED_KEYS) if lists is None else lists.block
    tiles = choose_tiles(head_dim, block[0], shared_kb(data.q.device), data.v_scale is not None)
    rows = ceil_div(length, block[0])
    map_rows = rows if lists is None else lists.samples * lists.heads * rows
    int8_kernel[(batch * heads * rows,)](
        data.q,
        data.q_scale,
        data.k,
        data.k_scale,
        data.v,
        data.v_scale,
        out,
        data.lse,
        None if lists is None else lists.row_ptr,
        None if lists is None else lists.ids,
        None if lists is None else lists.order,
        call.seq_lens,
        *strides_of(data.v),
        call.video,
        call.text_start,
        length,
        data.q.shape[2],
        rows,
        heads,
        map_rows,
        1 if lists is None else lists.heads,
        batch * heads * rows // map_rows,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block[0],
        BLOCK_COLS=block[1],
        TILE_N=tiles.keys,
        SCALED=SCALED_KEYS,
        COPIES=COPIES,
        SPARSE=lists is not None,
        HAS_LENS=call.seq_lens is not None,
        FP8=data.v.dtype == torch.float8_e4m3fn,
        INT8=data.v.dtype == torch.int8,
        NEED_LSE=data.lse.numel() > 0,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,
    )
    return out, data.lse
