# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""From the mass of every block to a map of one bit a block, and from there to lists, in Triton. Imported on first use.

Shapes
    sums          fp32 [B, H, M, N], attention mass of every block, not negative
    counts        int32 [B, H], how many video columns each row of a head keeps
    bits          uint8 [B, H, M, ceil(N / 8)], lowest bit first; a row starts on a byte
    kept          fp32 [B, H, M], mass of the kept blocks of a row
    row_ptr, ids  int32 [B * H * M + 1] and int16 or int32 [capacity], see `BlockIndex`
Rows before `video_rows` and columns before `video_cols` are video, the others are text, which is always kept.

One program owns one row and holds it in registers, as a tile of [bytes, 8 bits]. Positive floats are ordered like their
bits read as integers. So the smallest kept value is found bit by bit, from the highest: each time the row is counted
once. The search ends as soon as the count is exact, mostly after 15 to 20 of the 31 bits. Where equal values are left
over, a second search finds the column up to which they are kept. No sort, no atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from videosparse.blocks import SELECTION_LIMIT, id_dtype
from videosparse.kernels.gpu import on_device


@triton.jit
def _rank(x):
    """int32 that grows with x: 0 for NaN, 1 for 0 and below, more for positive numbers."""
    raw = x.to(tl.int32, bitcast=True)
    return tl.where((raw & 0x7FFFFFFF) > 0x7F800000, 0, tl.maximum(raw, 0) + 1)


@triton.jit
def _smallest_kept(rank, count, found):
    """The largest level that at least `count` ranks reach, and how many do; `found` of them reach level 0."""
    level = 0
    bit = 1 << 30
    while (bit > 0) & (found > count):
        reach = tl.sum((rank >= level + bit).to(tl.int32))
        enough = reach >= count
        level = tl.where(enough, level + bit, level)
        found = tl.where(enough, reach, found)
        bit = bit >> 1
    return level, found


@triton.jit
def _end_of_ties(tied, column, count, PAD: tl.constexpr):
    """The column before which `count` of the tied columns lie; there are more than that."""
    end = 0
    before = 0
    bit = PAD // 2
    while (bit > 0) & (before < count):
        reach = tl.sum((tied & (column < end + bit)).to(tl.int32))
        fits = reach <= count
        end = tl.where(fits, end + bit, end)
        before = tl.where(fits, reach, before)
        bit = bit >> 1
    return end


# sizes change from call to call: specialising would compile again and again
@triton.jit(do_not_specialize=["rows", "columns", "video_rows", "video_cols"])
def keep_largest_kernel(
    sums_ptr, counts_ptr, bits_ptr, kept_ptr, rows, columns, video_rows, video_cols, PAD: tl.constexpr
):
    """One row: its bits, and the mass that they keep."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, PAD // 8)
    bit = tl.arange(0, 8)
    column = byte[:, None] * 8 + bit[None, :]
    x = tl.load(sums_ptr + row * columns + column, mask=column < columns, other=0.0)
    is_video = column < video_cols
    rank = tl.where(is_video, _rank(x), -1)

    count = tl.minimum(tl.load(counts_ptr + row // rows), video_cols)
    count = tl.where(row % rows < video_rows, count, video_cols)
    level, found = _smallest_kept(rank, count, video_cols)
    end = columns
    if found > count:
        above = tl.sum((rank > level).to(tl.int32))
        end = _end_of_ties(rank == level, column, count - above, PAD)
    keep = (rank > level) | ((rank == level) & (column < end)) | (~is_video & (column < columns))

    packed = tl.sum(tl.where(keep, 1 << bit[None, :], 0), 1)
    row_bytes = tl.cdiv(columns, 8)
    tl.store(bits_ptr + row * row_bytes + byte, packed.to(tl.uint8), mask=byte < row_bytes)
    tl.store(kept_ptr + row, tl.sum(tl.where(keep, x, 0.0)))


@triton.jit
def _ones(byte):
    """How many of the lowest eight bits are set."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


@triton.jit(do_not_specialize=["row_ptr", "capacity", "columns"])
def expand_kernel(bits_ptr, row_ptr, ids_ptr, capacity, columns, PAD: tl.constexpr):
    """One row: the numbers of its columns, where its list starts, and not past its end."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ptr + row)
    room = tl.minimum(tl.load(row_ptr + row + 1), capacity) - start
    byte = tl.arange(0, PAD // 8)
    bit = tl.arange(0, 8)
    row_bytes = tl.cdiv(columns, 8)
    packed = tl.load(bits_ptr + row * row_bytes + byte, mask=byte < row_bytes, other=0).to(tl.int32)
    ones = _ones(packed)
    first = tl.cumsum(ones, 0) - ones
    column = byte[:, None] * 8 + bit[None, :]
    place = first[:, None] + _ones(packed[:, None] & ((1 << bit) - 1)[None, :])
    keep = (((packed[:, None] >> bit[None, :]) & 1) != 0) & (column < columns) & (place < room)
    tl.store(ids_ptr + start.to(tl.int64) + place, column.to(ids_ptr.dtype.element_ty), mask=keep)


def choose_pad(columns: int) -> int:
    """The power of two, at least 8, that a row is padded to."""
    if columns > SELECTION_LIMIT:
        raise ValueError(
            f"Blocks are selected in rows of at most {SELECTION_LIMIT} (got {columns}); use larger blocks for so long "
            "a sequence."
        )
    return max(8, 1 << (columns - 1).bit_length())


def choose_warps(pad: int) -> int:
    """64 elements a thread: a warp by itself counts without waiting for others."""
    return min(8, max(1, pad // 2048))


def keep_largest(
    sums: torch.Tensor, counts: torch.Tensor, bits: torch.Tensor, video_rows: int, video_cols: int
) -> torch.Tensor:
    """Write which blocks of a row have the largest mass; exact, and equal to the bit for equal inputs.

    A video row keeps the counts[b, h] largest of its video columns, of equal ones those that come first, and all text
    columns. NaN counts as the smallest, negative numbers as 0. A text row keeps everything. Nothing waits for the
    device.

    Args:
        sums: fp32 [B, H, M, N], contiguous, N at most 16,384.
        counts: int32 [B, H], contiguous, 1..video_cols.
        bits: uint8 [B, H, M, ceil(N / 8)], contiguous; all of it is written, unused bits of a last byte 0.
        video_rows, video_cols: rows and columns of blocks before the text.

    Returns:
        fp32 [B, H, M], the mass of the kept blocks of each row, text columns included.

    Raises:
        ValueError: rows are too long.
    """
    batch, heads, rows, columns = sums.shape
    kept = torch.empty(batch, heads, rows, dtype=torch.float32, device=sums.device)
    if sums.numel() == 0:
        return kept
    pad = choose_pad(columns)
    with on_device(sums):
        keep_largest_kernel[(batch * heads * rows,)](
            sums, counts, bits, kept, rows, columns, video_rows, video_cols, PAD=pad, num_warps=choose_warps(pad)
        )
    return kept


def expand(bits: torch.Tensor, row_ptr: torch.Tensor, capacity: int, columns: int) -> torch.Tensor:
    """The lists of a map of bits. Nothing waits for the device.

    Args:
        bits: uint8 [samples, heads, rows, ceil(columns / 8)], contiguous.
        row_ptr: int32 [samples * heads * rows + 1]; row r owns the places row_ptr[r] to row_ptr[r + 1].
        capacity: entries to allocate; nothing is written beyond, nor beyond the end of a row.
        columns: of the map, at most 16,384.

    Returns:
        ids [capacity], see `id_dtype`: ascending within a row; what lies beyond row_ptr[-1] is undefined.

    Raises:
        ValueError: rows are too long.
    """
    ids = torch.empty(capacity, dtype=id_dtype(columns), device=bits.device)
    rows = row_ptr.shape[0] - 1
    if rows == 0 or capacity == 0:
        return ids
    pad = choose_pad(columns)
    with on_device(bits):
        expand_kernel[(rows,)](bits, row_ptr, ids, capacity, columns, PAD=pad, num_warps=choose_warps(pad))
    return ids
