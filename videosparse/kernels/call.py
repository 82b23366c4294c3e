"""What one attention call is besides its tensors: passed from the custom ops to whichever backend runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Lists:
    """Ragged rows of kept key blocks; the tensors and sizes of a `BlockIndex` without its checks.

    Args:
        row_ptr: int32 [samples * heads * rows + 1].
        ids: int32 [capacity], ascending within a row.
        order: int32 [samples * heads * rows + 1], the order in which to start rows, then how many are long.
        block: (query rows, key rows) of a block.
        samples, heads: of the map, 1 where it is shared.
    """

    row_ptr: torch.Tensor
    ids: torch.Tensor
    order: torch.Tensor
    block: tuple[int, int]
    samples: int
    heads: int


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The geometry of one call.

    Args:
        lists: which key blocks are read; None reads every valid key.
        seq_lens: int32 [B], the position where each sample's text ends; None when all text is valid.
        video: positions [0, video) are valid tokens.
        text_start: positions [text_start, seq_lens[b]) are valid tokens; equal to `video` when there is no gap.
        scale: factor of the scores.
        order: int32 [H, 8], see `ordering.axis_table`: q, k and v come in that token order, and out and lse are to be
            written in raster order; None when positions are what they are.
    """

    lists: Lists | None
    seq_lens: torch.Tensor | None
    video: int
    text_start: int
    scale: float
    order: torch.Tensor | None = None
