"""What a run did: `RunReport`, and the counts that it is made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from videosparse.blocks import BlockIndex, PackedIndex
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.policies.base import LayerPlan, Mode


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    Args:
        grid: token grid of the video.
        tokens: video and text tokens that attend to each other, padding included.
        steps: denoising steps seen.
        video_density: kept / all blocks where both sides are video, mean over sparse calls; 1 when there were none. For
            maps that are searched for, what was asked, rounded to whole blocks: heads differ, their mean does not.
        density: the same, text and forced blocks included.
        average_density: mean over all calls, dense ones counting 1: attention work relative to dense, searches left
            out (`videosparse plan` tells what they cost).
        dense_calls, sparse_calls: attention calls planned, layers x branches x steps. A step cache that skips layers
            skips some of them.
        backend: kernel of the sparse calls, "triton", "torch", "fa4" or "flex"; "none" for a dense processor.
        dense_backend: what runs dense calls: "native SDPA" or the backend chosen by the user, as Diffusers names it;
            "videosparse triton" for our kernel, "videosparse torch" where there is no Triton; "FlashAttention-3" or
            "FlashAttention-4".
        search_calls: those of the dense calls that searched for maps, and of the sparse ones that did so again.
        quant: integers in sparse calls, or in all of a dense processor: see `KernelOptions`; None for none.
    """

    grid: VideoGrid
    tokens: int
    steps: int
    video_density: float
    density: float
    average_density: float
    dense_calls: int
    sparse_calls: int
    backend: str
    dense_backend: str
    quant: str | None = None
    search_calls: int = 0


@dataclass(eq=False)
class RunRecord:
    """Counts of a run in progress. Densities of static maps wait for `report`: reading one would stall the run."""

    layout: TokenLayout
    backend: str
    dense_backend: str
    quant: str | None = None
    steps: int = 0
    dense_calls: int = 0
    search_calls: int = 0
    sparse: dict[BlockIndex, tuple[TokenLayout, int]] = field(default_factory=dict)
    searched: Counter[tuple[float, float]] = field(default_factory=Counter)

    def add(self, plan: LayerPlan) -> None:
        """Count one planned call; keeps no map that was searched for, only how dense it is, which sizes tell."""
        self.search_calls += plan.mode in (Mode.SEARCH, Mode.REFRESH)
        if plan.index is None or plan.mode is Mode.SEARCH:
            self.dense_calls += 1
        elif isinstance(plan.index, PackedIndex):
            known = plan.densities
            if known is None:
                assert plan.selection is not None
                known = plan.selection.densities(plan.index.shape)
            self.searched[known] += 1
        else:
            _, count = self.sparse.get(plan.index, (plan.layout, 0))
            self.sparse[plan.index] = plan.layout, count + 1

    def report(self) -> RunReport:
        """The figures; waits for the device once per map."""
        maps = [(*densities(index, layout), count) for index, (layout, count) in self.sparse.items()]
        maps += [(*both, count) for both, count in self.searched.items()]
        calls = sum(count for *_, count in maps)
        density = sum(every * count for every, _, count in maps)
        video = sum(among_video * count for _, among_video, count in maps)
        return RunReport(
            grid=self.layout.grid,
            tokens=self.layout.video + self.layout.text,
            steps=self.steps,
            video_density=video / calls if calls else 1.0,
            density=density / calls if calls else 1.0,
            average_density=(self.dense_calls + density) / max(1, self.dense_calls + calls),
            dense_calls=self.dense_calls,
            sparse_calls=calls,
            backend=self.backend,
            dense_backend=self.dense_backend,
            quant=self.quant,
            search_calls=self.search_calls,
        )


def densities(index: BlockIndex, layout: TokenLayout) -> tuple[float, float]:
    """(kept / all blocks, the same among blocks whose both sides are video) of a map."""
    samples, heads, rows, columns = index.shape
    counts = index.row_ptr.diff().long()
    row = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts) % rows
    video_rows, video_columns = (ceil_div(layout.video, b) for b in index.block)
    inside = (row < video_rows) & (index.ids[: row.numel()] < video_columns)
    total = samples * heads
    return row.numel() / (total * rows * columns), int(inside.sum()) / (total * video_rows * video_columns)
