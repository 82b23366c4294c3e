"""From the mass of every block to a map of one bit a block, and from there to lists, in plain torch.

What `triton_select` does, on any device: the reference beside the kernels, and the path without Triton. From equal
masses and counts both keep equal bits; the kept mass of a row may differ in its last digits.
"""

from __future__ import annotations

import torch

from videosparse.blocks import compact_rows, pack_rows, unpack_rows

_SLAB = 2**22
"""Blocks that are sorted at a time."""


def keep_largest(
    sums: torch.Tensor, counts: torch.Tensor, bits: torch.Tensor, video_rows: int, video_cols: int
) -> torch.Tensor:
    """Write which blocks of a row have the largest mass.

    A video row keeps the counts[b, h] largest of its video columns, of equal ones those that come first, and all text
    columns. NaN counts as the smallest, negative numbers as 0. A text row keeps everything.

    Args:
        sums: fp32 [B, H, M, N], not negative.
        counts: int32 [B, H], 1..video_cols.
        bits: uint8 [B, H, M, ceil(N / 8)]; all of it is written, see `pack_rows`.
        video_rows, video_cols: rows and columns of blocks before the text.

    Returns:
        fp32 [B, H, M], the mass of the kept blocks of each row, text columns included.
    """
    _, _, rows, columns = sums.shape
    kept = torch.empty(sums.shape[:3], dtype=torch.float32, device=sums.device)
    slab = max(1, _SLAB // columns)
    for start in range(0, rows, slab):
        part = sums[:, :, start : start + slab]
        keep = torch.ones_like(part, dtype=torch.bool)
        video = keep[:, :, : max(0, video_rows - start), :video_cols]
        video.copy_(_largest(part[:, :, : video.shape[2], :video_cols], counts))
        bits[:, :, start : start + slab] = pack_rows(keep)
        kept[:, :, start : start + slab] = torch.where(keep, part, 0).sum(-1)
    return kept


def _largest(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """bool like sums [B, H, M, N]: the counts[b, h] largest of each row."""
    level = torch.where(sums.isnan(), -1.0, sums.clamp(min=0))
    place = level.argsort(dim=-1, descending=True, stable=True)
    wanted = torch.arange(sums.shape[3], device=sums.device) < counts[..., None, None]
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, place, wanted.expand_as(place))


def expand(bits: torch.Tensor, row_ptr: torch.Tensor, capacity: int, columns: int) -> torch.Tensor:
    """The lists of a map of bits.

    Args:
        bits: uint8 [samples, heads, rows, ceil(columns / 8)].
        row_ptr: int32 [samples * heads * rows + 1]; row r owns the places row_ptr[r] to row_ptr[r + 1].
        capacity: entries to allocate; nothing is written beyond.
        columns: of the map.

    Returns:
        ids [capacity], see `id_dtype`: ascending within a row; what lies beyond row_ptr[-1] is undefined.
    """
    return compact_rows(unpack_rows(bits, columns).flatten(0, 2), row_ptr.long(), capacity)
