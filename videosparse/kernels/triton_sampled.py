# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The attention mass of every block from some of its query rows, in Triton, for any GPU, length and strides.

Shapes
    q, k          [B, L, H, D] by strides, contiguous along D; offsets are 64-bit
    lse           fp32 [B, H, L], natural log, -inf for rows that count nothing
    sums          fp32 [B, H, ceil(L / BLOCK_M), ceil(L / TILE_N)]
    lens          int32 [B], where each sample's text ends
Positions [0, video) are video, [text_start, lens[b]) are text, all others are never read.

Of a block of query rows those are visited whose place in it is a multiple of BLOCK_M / SAMPLE. Their sum, times the
valid rows of the block over the visited ones, estimates the sum over all. One program gathers the visited rows of
several blocks into one tile and walks all keys: first those that are surely valid, then the others under a mask. So
matrix products are as large as in the exact kernel, and there are SAMPLE / BLOCK_M as many.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E, AttentionCall
from videosparse.kernels.gpu import on_device
from videosparse.kernels.triton_common import (
    LOG2_E_IN_KERNEL,
    end_of_text,
    head_pad,
    is_token,
    load_rows,
    shared_kb,
    strides_of,
)
from videosparse.kernels.triton_far import NO_REACH, REACH, change
from videosparse.kernels.triton_sums import SumTiles, add_up, choose_tiles
from videosparse.layout import ceil_div


@triton.jit
def _count(start, limit, step, COUNT: tl.constexpr):
    """How many of the COUNT positions start, start + step, ... lie before `limit`."""
    return tl.minimum(tl.cdiv(tl.maximum(limit - start, 0), step), COUNT)


@triton.jit
def _tokens(start, video, text_start, end, step, COUNT: tl.constexpr):
    """How many of the COUNT positions start, start + step, ... are tokens; fp32."""
    text = _count(start, end, step, COUNT) - _count(start, text_start, step, COUNT)
    return (_count(start, video, step, COUNT) + tl.maximum(text, 0)).to(tl.float32)


@triton.jit
def _levels(lse):
    """lse in base 2, fp32, and exp2 of what rounding added, by which all masses of the row would be off alike."""
    empty = tl.abs(lse) == float("inf")
    exact = tl.where(empty, 0.0, lse).to(tl.float64) * LOG2_E_IN_KERNEL
    level = exact.to(tl.float32)
    added = (level.to(tl.float64) - exact).to(tl.float32)
    # a row that counts nothing gets exp2(-inf); its scores are finite, as its queries are zeros or real ones
    return tl.where(empty, float("inf"), level), tl.math.exp2(added)


@triton.jit
def _estimate(
    q,
    level,
    undo,
    share,
    k_base,
    line,
    n,
    stride_kl,
    video,
    text_start,
    end,
    scale_log2,
    columns,
    rows_left,
    q_token,
    q_first,
    q_last,
    far_alpha,
    far_window,
    far_first,
    far_seen,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
    FAR: tl.constexpr,
):
    """Store the sums of key tile `n`, for each SAMPLE rows one."""
    k_pos = n * TILE_N + tl.arange(0, TILE_N)
    k_valid = is_token(k_pos, video, text_start, end) if MASKED else k_pos >= 0
    if MASKED or HEAD_DIM != HEAD_PAD:
        k = load_rows(k_base, k_pos, stride_kl, k_valid, HEAD_DIM, HEAD_PAD)
    else:  # no mask at all, which costs registers
        k = tl.load(k_base + k_pos.to(tl.int64)[:, None] * stride_kl + tl.arange(0, HEAD_PAD)[None, :])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if FAR:  # raster order: methods that look at other orders visit all rows
        scores = change(
            scores, q_token, q_first, q_last, n * TILE_N, None, 0, video, far_alpha, far_window, far_first, far_seen,
            TILE_N, False,
        )  # fmt: skip
    x = scores - level[:, None]
    if MASKED:
        x = tl.where(k_valid[None, :], x, -float("inf"))
    mass = tl.sum(tl.math.exp2(x), 1) * undo
    blocks: tl.constexpr = mass.shape[0] // SAMPLE
    block = tl.arange(0, blocks)
    found = tl.sum(tl.reshape(mass, [blocks, SAMPLE]), 1)
    tl.store(line + block.to(tl.int64) * columns + n, found * share, mask=block < rows_left)


SIZES = ["lens_ptr", "video", "text_start", "length", "tiles", "rows", "columns", "heads"]


# sizes change from call to call: specialising would compile again and again
@triton.jit(do_not_specialize=SIZES + REACH)
def sampled_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    sums_ptr,
    lens_ptr,
    stride_qb: tl.int64,
    stride_ql: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kl: tl.int64,
    stride_kh: tl.int64,
    video,
    text_start,
    length,
    tiles,
    rows,
    columns,
    heads,
    scale_log2,
    far_alpha,
    far_window,
    far_first,
    far_seen,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HAS_LENS: tl.constexpr,
    STAGES: tl.constexpr,
    FAR: tl.constexpr,
):
    """The visited rows of TILE_M / SAMPLE blocks against all keys; a head has `rows` blocks, in `tiles` such tiles."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    sample = (program // tiles // heads).to(tl.int64)
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)

    blocks: tl.constexpr = TILE_M // SAMPLE
    visited = tl.arange(0, TILE_M)
    q_pos = (tile * blocks + visited // SAMPLE) * BLOCK_M + visited % SAMPLE * (BLOCK_M // SAMPLE)
    q_valid = is_token(q_pos, video, text_start, end)
    q = load_rows(q_ptr + sample * stride_qb + head * stride_qh, q_pos, stride_ql, q_valid, HEAD_DIM, HEAD_PAD)
    lse = tl.load(lse_ptr + (sample * heads + head) * length + q_pos, mask=q_valid, other=-float("inf"))
    level, undo = _levels(lse)
    k_base = k_ptr + sample * stride_kb + head * stride_kh

    first = tile * blocks
    q_first = first * BLOCK_M
    q_last = q_first + blocks * BLOCK_M - 1
    start = (first + tl.arange(0, blocks)) * BLOCK_M
    seen = _tokens(start, video, text_start, end, BLOCK_M // SAMPLE, SAMPLE)
    share = _tokens(start, video, text_start, end, 1, BLOCK_M) / tl.maximum(seen, 1.0)

    line = sums_ptr + ((sample * heads + head) * rows + first) * columns
    # one run of surely valid keys: the video, and the text where it follows without a gap
    sure = video
    if text_start == video:
        sure = tl.maximum(video, end)
    whole = sure // TILE_N
    for n in tl.range(0, whole, num_stages=STAGES):
        _estimate(
            q, level, undo, share, k_base, line, n, stride_kl, video, text_start, end, scale_log2, columns,
            rows - first, q_pos, q_first, q_last, far_alpha, far_window, far_first, far_seen, HEAD_DIM, HEAD_PAD,
            SAMPLE, TILE_N, MASKED=False, FAR=FAR,
        )  # fmt: skip
    for n in tl.range(whole, columns, num_stages=1):
        _estimate(
            q, level, undo, share, k_base, line, n, stride_kl, video, text_start, end, scale_log2, columns,
            rows - first, q_pos, q_first, q_last, far_alpha, far_window, far_first, far_seen, HEAD_DIM, HEAD_PAD,
            SAMPLE, TILE_N, MASKED=True, FAR=FAR,
        )  # fmt: skip


def block_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    block: tuple[int, int],
    sample: int,
    tiles: SumTiles | None = None,
) -> torch.Tensor:
    """Launch the kernel on checked tensors; see `kernels.block_sums`. `tiles` overrides the choice, for benchmarks.

    Args:
        q, k, lse, call, block: as in `triton_sums.block_sums`.
        sample: visited rows of a block, a power of two up to block[0]: those whose place in the block is a multiple of
            block[0] / sample. A block none of whose visited rows is a token gives 0.

    Returns:
        fp32 [B, H, ceil(L / block[0]), ceil(L / block[1])].

    Raises:
        ValueError: sample does not fit.
    """

    if not 1 <= sample <= min(64, block[0]) or sample & (sample - 1):
        raise ValueError(f"sample must be a power of two of at most 64 rows and the block's {block[0]} (got {sample}).")
    batch, length, heads, head_dim = q.shape
    tiles = replace(tiles or choose_tiles(head_dim, q.dtype, block, shared_kb(q.device)), unit=sample)
    rows, columns = ceil_div(length, block[0]), ceil_div(length, tiles.keys)
    sums = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    if sums.numel() == 0:
        return sums
    row_tiles = ceil_div(rows * sample, tiles.rows)
    with on_device(q):
        sampled_kernel[(batch * heads * row_tiles,)](
            q,
            k,
            lse.float().contiguous(),
            sums,
            call.seq_lens,
            *strides_of(q),
            *strides_of(k),
            call.video,
            call.text_start,
            length,
            row_tiles,
            rows,
            columns,
            heads,
            call.scale * LOG2_E,
            *(call.far or NO_REACH),
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            BLOCK_M=block[0],
            SAMPLE=sample,
            TILE_M=tiles.rows,
            TILE_N=tiles.keys,
            HAS_LENS=call.seq_lens is not None,
            STAGES=tiles.stages,
            FAR=call.far is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
    return add_up(sums, (1, block[1] // tiles.keys))
