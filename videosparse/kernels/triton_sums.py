# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The attention mass of every block, in Triton, for any GPU, length and strides. Imported on first use only.

Shapes
    q, k          [B, L, H, D] by strides, contiguous along D; offsets are 64-bit
    lse           fp32 [B, H, L], natural log, -inf for rows that count nothing
    sums          fp32 [B, H, ceil(L / UNIT_M), ceil(L / UNIT_N)]
    lens          int32 [B], where each sample's text ends
    table         int32 [H, 8], the token order of q, k and lse, for `triton_far`
Positions [0, video) are video, [text_start, lens[b]) are text, all others are never read.

One program owns one tile of query rows and walks all keys, first those that are surely valid, then the others under a
mask. Programs of one head run side by side, so that they share its keys in L2. Each sum is written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.triton_common import (
    LOG2_E_IN_KERNEL,
    end_of_text,
    head_pad,
    is_token,
    load_rows,
    shared_kb,
    strides_of,
)
from videosparse.kernels.triton_far import NO_REACH, REACH, change, raster
from videosparse.layout import ceil_div


@triton.jit
def open_tile(
    q_ptr,
    lse_ptr,
    lens_ptr,
    stride_qb,
    stride_ql,
    stride_qh,
    video,
    text_start,
    length,
    tiles,
    heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE_M: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    """(tile, head, sample, end of its text, positions, q, lse) of this program, which owns a tile of query rows.

    lse is inf where a row counts nothing.
    """
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    sample = (program // tiles // heads).to(tl.int64)
    end = end_of_text(lens_ptr, sample, length, HAS_LENS)
    q_pos = tile * TILE_M + tl.arange(0, TILE_M)
    q_valid = is_token(q_pos, video, text_start, end)
    q = load_rows(q_ptr + sample * stride_qb + head * stride_qh, q_pos, stride_ql, q_valid, HEAD_DIM, HEAD_PAD)
    lse = tl.load(lse_ptr + (sample * heads + head) * length + q_pos, mask=q_valid, other=-float("inf"))
    # a row that counts nothing gets exp2(-inf); its scores are finite, as its queries are zeros or real ones
    level = tl.where(lse == -float("inf"), float("inf"), lse)
    return tile, head, sample, end, q_pos, q, level


@triton.jit
def probabilities(
    q,
    level,
    k_base,
    start,
    stride_kl,
    video,
    text_start,
    end,
    scale,
    q_token,
    q_first,
    q_last,
    table_ptr,
    head,
    far_alpha,
    far_window,
    far_first,
    far_seen,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
    ORDER: tl.constexpr,
    FAR: tl.constexpr,
):
    """exp(score - lse), fp32 [TILE_M, TILE_N], of the TILE_N keys from `start`; 0 where there is no key or no row."""
    k_pos = start + tl.arange(0, TILE_N)
    k_valid = is_token(k_pos, video, text_start, end) if MASKED else k_pos >= 0
    if MASKED or HEAD_DIM != HEAD_PAD:
        k = load_rows(k_base, k_pos, stride_kl, k_valid, HEAD_DIM, HEAD_PAD)
    else:  # no mask at all, which costs registers
        k = tl.load(k_base + k_pos.to(tl.int64)[:, None] * stride_kl + tl.arange(0, HEAD_PAD)[None, :])
    # the level is taken off in natural log: rounded in base 2, it would shift all masses of a row the same way
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if FAR:
        scores = change(
            scores, q_token, q_first, q_last, start, table_ptr, head, video, far_alpha, far_window, far_first, far_seen,
            TILE_N, ORDER,
        )  # fmt: skip
    x = (scores - level[:, None]) * LOG2_E_IN_KERNEL
    if MASKED:
        x = tl.where(k_valid[None, :], x, -float("inf"))
    return tl.math.exp2(x)


@triton.jit
def _write(sums_row, tile, mass, columns, rows_left, UNIT_M: tl.constexpr, TILE_M: tl.constexpr):
    """Store the sums of a tile's units; one unit is the whole tile or half of its rows."""
    if UNIT_M == TILE_M:
        tl.store(sums_row + tile, tl.sum(mass, 0))
    else:
        parts: tl.constexpr = TILE_M // UNIT_M
        unit = tl.arange(0, parts)
        found = tl.sum(tl.reshape(mass, [parts, UNIT_M]), 1)
        tl.store(sums_row + unit.to(tl.int64) * columns + tile, found, mask=unit < rows_left)


SIZES = ["lens_ptr", "video", "text_start", "length", "tiles", "rows", "columns", "heads"]


# sizes change from call to call: specialising would compile again and again
@triton.jit(do_not_specialize=SIZES + REACH)
def sums_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    sums_ptr,
    lens_ptr,
    table_ptr,
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
    scale,
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
    sums_row = sums_ptr + ((sample * heads + head) * rows + first_row) * columns
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
        _write(sums_row, n, tl.sum(p, 1), columns, rows - first_row, UNIT_M, TILE_M)
    for n in tl.range(whole, columns, num_stages=1):
        p = probabilities(
            q, level, k_base, n * TILE_N, stride_kl, video, text_start, end, scale, q_token, q_first, q_last, table_ptr,
            head, far_alpha, far_window, far_first, far_seen, HEAD_DIM, HEAD_PAD, TILE_N, MASKED=True, ORDER=ORDER,
            FAR=FAR,
        )  # fmt: skip
        _write(sums_row, n, tl.sum(p, 1), columns, rows - first_row, UNIT_M, TILE_M)


@dataclass(frozen=True)
class SumTiles:
    """How one program works: query rows, key rows, rows of a written sum, warps and pipeline stages."""

    rows: int
    keys: int
    unit: int
    warps: int
    stages: int


def choose_tiles(head_dim: int, dtype: torch.dtype, block: tuple[int, int], shared_kb: int) -> SumTiles:
    """Tile sizes that neither spill registers nor exceed the shared memory of the card.

    Args:
        head_dim: 8..128.
        dtype: of q and k.
        block: (query rows, key rows).
        shared_kb: shared memory of one program.
    """
    if dtype == torch.float32:  # exact products without tensor cores; anything larger, or pipelined, spills somewhere
        return SumTiles(64, 16, 64, 8, 1)
    # two programs of 128 rows share a multiprocessor: one multiplies while the other exponentiates
    return SumTiles(128, block[1], block[0], 8, 3 if shared_kb > 163 and block[1] == 64 else 2)


def block_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    block: tuple[int, int],
    tiles: SumTiles | None = None,
) -> torch.Tensor:
    """Launch the kernel on checked tensors of the current device; see `kernels.block_sums`.

    Args:
        q, k, lse, call, block: as there.
        tiles: overrides the choice, for benchmarks.

    Returns:
        fp32 [B, H, ceil(L / block[0]), ceil(L / block[1])].
    """

    batch, length, heads, head_dim = q.shape
    tiles = tiles or choose_tiles(head_dim, q.dtype, block, shared_kb(q.device))
    rows, columns = ceil_div(length, tiles.unit), ceil_div(length, tiles.keys)
    sums = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    if sums.numel() == 0:
        return sums
    row_tiles = ceil_div(length, tiles.rows)
    sums_kernel[(batch * heads * row_tiles,)](
        q,
        k,
        lse.float().contiguous(),
        sums,
        call.seq_lens,
        call.order,
        *strides_of(q),
        *strides_of(k),
        call.video,
        call.text_start,
        length,
        row_tiles,
        rows,
        columns,
        heads,
        call.scale,
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
    return add_up(sums, (block[0] // tiles.unit, block[1] // tiles.keys))


def add_up(sums: torch.Tensor, parts: tuple[int, int]) -> torch.Tensor:
    """Add up units to blocks of `parts` units, fp32 [B, H, rows, columns]."""
    for dim, count in ((2, parts[0]), (3, parts[1])):
        if count > 1:
            padding = [0, 0] * (3 - dim) + [0, -sums.shape[dim] % count]
            sums = torch.nn.functional.pad(sums, padding)
            sums = sums.view(*sums.shape[:dim], -1, count, *sums.shape[dim + 1 :]).sum(dim + 1)
    return sums
