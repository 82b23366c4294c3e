"""How much of attention a block map keeps, and what dropping the rest does to its output.

Judged on the queries and keys of real calls: `sums` are the exact masses of `kernels.block_sums`, fp32 [B, H, Mq, Nk],
with the lse of the same dense call.
"""

from __future__ import annotations

import torch

from videosparse.blocks import BlockIndex, BlockMap
from videosparse.layout import TokenLayout, ceil_div


def attention_recall(sums: torch.Tensor, block_map: BlockMap, layout: TokenLayout) -> torch.Tensor:
    """Share of the attention mass of video queries that the kept blocks hold, fp32 [B, H], 0..1.

    Args:
        sums: fp32 [B, H, Mq, Nk], mass of every block.
        block_map: what is kept, [B or 1, H or 1, Mq, Nk].
        layout: of the sequence, text on a fresh block.
    """
    rows = ceil_div(layout.video, block_map.block[0])
    video = sums[:, :, :rows]
    kept = video.masked_fill(~block_map.keep[:, :, :rows], 0)
    return kept.sum((2, 3)) / video.sum((2, 3))


def output_error(out: torch.Tensor, dense: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Relative L2 distance of an attention output from the dense one over the video tokens, fp32 [B, H].

    Args:
        out, dense: [B, L, H, D].
        layout: of the sequence.
    """
    found, truth = (x[:, : layout.video].float() for x in (out, dense))
    return (found - truth).square().sum((1, 3)).sqrt() / truth.square().sum((1, 3)).sqrt()


def best_map(sums: torch.Tensor, density: float, layout: TokenLayout, block: tuple[int, int]) -> BlockMap:
    """The map of greatest mean recall at a density: in each sample the video blocks that hold the most, wherever.

    How many a head or a row keeps is free, so no rule at that density does better. Every row keeps its largest block,
    and every block of text is kept.

    Args:
        sums: fp32 [B, H, Mq, Nk] with the lse of the same call.
        density: kept / all blocks where both sides are video, in (0, 1].
        layout: of the sequence, text on a fresh block.
        block: (query rows, key rows).
    """
    rows, cols = (ceil_div(layout.video, b) for b in block)
    video = sums[:, :, :rows, :cols]
    largest = torch.zeros_like(video, dtype=torch.bool).scatter_(3, video.argmax(3, keepdim=True), True)
    ranked = video.masked_fill(largest, torch.inf).flatten(1)
    count = max(sums.shape[1] * rows, round(density * sums.shape[1] * rows * cols))
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, ranked.topk(count, dim=1).indices, True)
    return _with_text(keep.view(video.shape), sums, layout, block)


def random_map(sums: torch.Tensor, density: float, layout: TokenLayout, block: tuple[int, int], seed: int) -> BlockMap:
    """As many random blocks in every row: what a density is worth without looking.

    Args:
        sums: fp32 [B, H, Mq, Nk], for its shape and device.
        density, layout, block: as in `best_map`.
        seed: the same gives the same map.
    """
    rows, cols = (ceil_div(layout.video, b) for b in block)
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(*sums.shape[:2], rows, cols, generator=generator).argsort(-1).argsort(-1)
    keep = (rank < max(1, round(density * cols))).to(sums.device)
    return _with_text(keep, sums, layout, block)


def map_of(index: BlockIndex) -> BlockMap:
    """The map that lists were made from. Waits for the device."""
    samples, heads, rows, cols = index.shape
    counts = index.row_ptr.diff().long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    keep = torch.zeros(len(counts), cols, dtype=torch.bool, device=counts.device)
    keep[row, index.ids[: len(row)].long()] = True
    return BlockMap(keep.view(samples, heads, rows, cols), index.block, index.q_len, index.kv_len)


def _with_text(keep: torch.Tensor, sums: torch.Tensor, layout: TokenLayout, block: tuple[int, int]) -> BlockMap:
    more = (0, sums.shape[3] - keep.shape[3], 0, sums.shape[2] - keep.shape[2])
    keep = torch.nn.functional.pad(keep, more, value=True)
    return BlockMap(keep, block, layout.length, layout.length)
