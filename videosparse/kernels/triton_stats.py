# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Sum, largest entry and number of large entries of every block of probabilities, in Triton. Imported on first use.

Shapes
    q, k          [B, L, H, D] by strides, contiguous along D; offsets are 64-bit
    lse           fp32 [B, H, L], natural log, -inf for rows that count nothing
    stats         fp32 [3, B, H, ceil(L / UNIT_M), ceil(L / TILE_N)]: sums, largest, entries of at least eps
    lens          int32 [B], where each sample's text ends
    table         int32 [H, 8], the token order of q, k and lse, for `triton_far`
Positions [0, video) are video, [text_start, lens[b]) are text, all others are never read.

The walk of `triton_sums`: one program owns one tile of query rows and goes over all keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.gpu import on_device
from videosparse.kernels.triton_common import head_pad, shared_kb, strides_of
from videosparse.kernels.triton_far import NO_REACH, REACH, raster
from videosparse.kernels.triton_sums import SIZES, SumTiles, choose_tiles, open_tile, probabilities
from videosparse.layout import ceil_div


@triton.jit
def _write(stats_row, tile, p, eps, plane, columns, rows_left, UNIT_M: tl.constexpr, TILE_M: tl.constexpr):
    """Store the three figures of a tile's units; one unit is the whole tile or half of its rows."""
    mass, peak, large = tl.sum(p, 1), tl.max(p, 1), tl.sum((p >= eps).to(tl.float32), 1)
    parts: tl.constexpr = TILE_M // UNIT_M
    unit = tl.arange(0, parts)
    place = stats_row + unit.to(tl.int64) * columns + tile
    inside = unit < rows_left
    tl.store(place, tl.sum(tl.reshape(mass, [parts, UNIT_M]), 1), mask=inside)
    tl.store(place + plane, tl.max(tl.reshape(peak, [parts, UNIT_M]), 1), mask=inside)
    tl.store(place + 2 * plane, tl.sum(tl.reshape(large, [parts, UNIT_M]), 1), mask=inside)


# sizes change from call to call: specialising would compile again and again
@triton.jit(do_not_specialize=[*SIZES, *REACH, "plane"])
def stats_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    stats_ptr,
    lens_ptr,
    table_ptr,
    stride_qb: tl.int64,
    stride_ql: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kl: tl.int64,
    stride_kh: tl.int64,
    plane: tl.int64,
    video,
    text_start,
    length,
    tiles,
    rows,
    columns,
    heads,
    scale,
    eps,
    far_alpha,
    far_window,
    far_first,
    far_seen,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    UNIT_M: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HAS_LENS: tl.constexpr,
    STAGES: tl.constexpr,
    ORDER: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile of query rows against all keys; `rows` and `columns` of units, `tiles` of TILE_M rows in a head."""
    tile, head, sample, end, q_pos, q, level = open_tile(
        q_ptr, lse_ptr, lens_ptr, stride_qb, stride_ql, stride_qh, video, text_start, length, tiles, heads,
        HEAD_DIM, HEAD_PAD, TILE_M, HAS_LENS,
    )  # fmt: skip
    k_base = k_ptr + sample * stride_kb + head * stride_kh
    q_first = tile * TILE_M
    q_last = q_first + TILE_M - 1
    q_token = q_pos
    if ORDER:
        q_token = raster(table_ptr, head, q_pos, video)

    first_row = tile * (TILE_M // UNIT_M)
    stats_row = stats_ptr + ((sample * heads + head) * rows + first_row) * columns
    # one run of surely valid keys: the video, and the text where it follows without a gap
    sure = video
    if text_start == video:
        sure = tl.maximum(video, end)
    whole = sure // TILE_N
    for n in tl.range(0, whole, num_stages=STAGES):
        p = probabilities(
            q, level, k_base, n * TILE_N, stride_kl, video, text_start, end, scale, q_token, q_first, q_last, table_ptr,
            head, far_alpha, far_window, far_first, far_seen, HEAD_DIM, HEAD_PAD, TILE_N, MASKED=False, ORDER=ORDER,
            FAR=FAR,
        )  # fmt: skip
        _write(stats_row, n, p, eps, plane, columns, rows - first_row, UNIT_M, TILE_M)
    for n in tl.range(whole, columns, num_stages=1):
        p = probabilities(
            q, level, k_base, n * TILE_N, stride_kl, video, text_start, end, scale, q_token, q_first, q_last, table_ptr,
            head, far_alpha, far_window, far_first, far_seen, HEAD_DIM, HEAD_PAD, TILE_N, MASKED=True, ORDER=ORDER,
            FAR=FAR,
        )  # fmt: skip
        _write(stats_row, n, p, eps, plane, columns, rows - first_row, UNIT_M, TILE_M)


def block_stats(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    block: tuple[int, int],
    eps: float,
    tiles: SumTiles | None = None,
) -> torch.Tensor:
    """Launch the kernel on checked tensors; `tiles` overrides the choice, for benchmarks.

    Returns:
        fp32 [3, B, H, ceil(L / block[0]), ceil(L / block[1])]: sum, largest entry, entries of at least `eps`.
    """

    batch, length, heads, head_dim = q.shape
    tiles = tiles or choose_tiles(head_dim, q.dtype, block, shared_kb(q.device))
    rows, columns = ceil_div(length, tiles.unit), ceil_div(length, tiles.keys)
    stats = torch.empty(3, batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    row_tiles = ceil_div(length, tiles.rows)
    with on_device(q):
        stats_kernel[(batch * heads * row_tiles,)](
            q,
            k,
            lse.float().contiguous(),
            stats,
            call.seq_lens,
            call.order,
            *strides_of(q),
            *strides_of(k),
            stats[0].numel(),
            call.video,
            call.text_start,
            length,
            row_tiles,
            rows,
            columns,
            heads,
            call.scale,
            eps,
            *(call.far or NO_REACH),
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            UNIT_M=tiles.unit,
            TILE_M=tiles.rows,
            TILE_N=tiles.keys,
            HAS_LENS=call.seq_lens is not None,
            STAGES=tiles.stages,
            ORDER=call.order is not None,
            FAR=call.far is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
    return gather(stats, (block[0] // tiles.unit, block[1] // tiles.keys))


def gather(stats: torch.Tensor, parts: tuple[int, int]) -> torch.Tensor:
    """Units to blocks of `parts` units, fp32 [3, B, H, rows, columns]: sums and counts add up, largest entries win."""
    for dim, count in ((3, parts[0]), (4, parts[1])):
        if count > 1:
            padding = [0, 0] * (4 - dim) + [0, -stats.shape[dim] % count]
            padded = torch.nn.functional.pad(stats, padding)
            units = padded.view(*padded.shape[:dim], -1, count, *padded.shape[dim + 1 :])
            sums, peaks, large = units
            stats = torch.stack(
                [sums.sum(dim), peaks.amax(dim), large.sum(dim)]
            )  # one dimension fewer, so dim is right
    return stats
