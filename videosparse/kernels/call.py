"""What one attention call is besides its tensors: passed from the custom ops to whichever backend runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from videosparse.blocks import BlockIndex
from videosparse.layout import TokenLayout
from videosparse.logits import Reach

LOG2_E = 1 / math.log(2)
"""Turns natural logarithms into those of base 2, which hardware takes exponentials in."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of a dtype are kept in, and lse comes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Lists:
    """Ragged rows of kept key blocks; the tensors and sizes of a `BlockIndex` without its checks.

    Args:
        row_ptr: int32 [samples * heads * rows + 1].
        ids: int16 or int32 [capacity], ascending within a row.
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

    @classmethod
    def of(cls, index: BlockIndex) -> Lists:
        """The lists of an index."""
        return cls(index.row_ptr, index.ids, index.order, index.block, *index.shape[:2])


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
            written in raster order; None when positions are what they are. Plain torch, and what measures blocks,
            take from it only which token a position holds, for `far`.
        far: how scores of far tokens are changed, see `FarLogits`; None leaves all.
    """

    lists: Lists | None
    seq_lens: torch.Tensor | None
    video: int
    text_start: int
    scale: float
    order: torch.Tensor | None = None
    far: Reach | None = None

    @classmethod
    def of(cls, layout: TokenLayout, index: BlockIndex | None, scale: float) -> AttentionCall:
        """The call of `attend` or `block_sums` on a layout."""
        lists = None if index is None else Lists.of(index)
        if not layout.text:
            return cls(lists, None, layout.video, layout.video, scale)
        return cls(lists, layout.seq_lens, layout.video, layout.text_start, scale)
