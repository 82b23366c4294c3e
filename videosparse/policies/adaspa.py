"""AdaSpa (arXiv 2502.21079): maps that are searched for while the video is made, and last for many steps.

One dense step tells how much attention each block of each head holds: sum of softmax(Q K^T / sqrt(D)) over the block.
Every row of blocks keeps those that hold most, until the maps are searched for again later in the run. That search
needs no dense step: the normalisers of the softmax (its log-sum-exp, lse) hardly change over the steps, so those of the
dense step serve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from videosparse.blocks import BlockIndex, PackedIndex, check_block
from videosparse.checking import check_flag, check_share
from videosparse.kernels.checks import check_sample
from videosparse.kernels.selection import Selection, columns_of, expand, select
from videosparse.layout import TokenLayout, ceil_div
from videosparse.policies.base import (
    BLOCK,
    LOOK_SHARE,
    DenseSchedule,
    LayerPlan,
    LayerState,
    Mode,
    RunStep,
    SparsityPolicy,
    check_call,
    check_same_size,
    part_of_run,
)

LSE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class AdaSpaPolicy(SparsityPolicy):
    """AdaSpa.

    Args:
        density: share of the video blocks that a row keeps, in (0, 1], mean over heads. Published: 0.2.
        refresh: when to search again: fractions of the run, taken at the first step that reaches them, or steps as
            ints, counted from 1. Published: step 30 of 50, 0.6. A refresh that is due by the time of a search counts
            as done; () never searches again.
        block: (query rows, key rows) of a block, each 64 or 128.
        head_adaptive: whether heads whose kept blocks hold enough of the attention give blocks to those that need more.
        recall_threshold: share of the attention, in (0, 1], above which a head's blocks hold enough of it.
        sample: rows of a block of queries that a search visits, 8, 16, 32 or 64, evenly spread; None visits all, which
            is exact and the paper's. 16 takes a seventh of the time with blocks of 128 rows, 3/10 with 64, and loses
            .004 of recall at most (`assets/results/search_cost.csv`, `attention_recall.csv`).
        lse_dtype: "float32" or "bfloat16": how the lse is kept for the refresh. What bfloat16 rounds off makes whole
            query rows count some percent more or less; which keys they attend to stays.
        offload_state: keep maps and lse in the memory of the CPU between calls; not with compiled blocks.

    Raises:
        TypeError, ValueError: a value of another type, or out of range.

    Source: the paper; there is no public code of its authors. Of the heads, as many as have a
    recall above the threshold, at most half, give blocks: those of highest recall keep density / 2, as many of lowest
    recall keep min(1, 1.5 density). Recall is the kept share of all that the video queries attend to, at `density`.
    Every sample has heads of its own.

    Differs from the paper: searches visit 16 rows of each block; blocks of 128x64, not 64x64, which is what kernels for
    Hopper like; text takes part as in HunyuanVideo, rows and columns of it are always kept, outside the budget, and
    count in the recall; the higher count is as far above that of `density` as the lower one is below, so that the mean
    stays `density` when counts are rounded, and above 2/3, where the lower one is at least 2 density - 1. Wan and Mochi
    are beyond the paper.
    """

    density: float = 0.2
    refresh: tuple[int | float, ...] = (0.6,)
    block: tuple[int, int] = BLOCK
    head_adaptive: bool = True
    recall_threshold: float = 0.8
    sample: int | None = 16
    lse_dtype: str = "float32"
    offload_state: bool = False

    name: ClassVar[str] = "adaspa"
    pure: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_block(self.block)
        for name in ("density", "recall_threshold"):
            check_share(name, getattr(self, name))
        for name in ("head_adaptive", "offload_state"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.refresh, tuple):
            raise TypeError(f"refresh must be a tuple of steps or fractions of the run (got {self.refresh!r}).")
        for value in self.refresh:
            _check_refresh(value)
        check_sample(self.sample)
        if not isinstance(self.lse_dtype, str) or self.lse_dtype not in LSE_DTYPES:
            raise ValueError(f"lse_dtype must be {' or '.join(LSE_DTYPES)} (got {self.lse_dtype!r}).")

    def plan(
        self,
        layout: TokenLayout,
        run: RunStep,
        layer: int,
        state: LayerState,
        *,
        device: torch.device,
        samples: int = 1,
        heads: int = 1,
    ) -> LayerPlan:
        """Search where nothing is kept yet, refresh where one is due, else sparse on the map that is kept.

        Raises:
            TypeError: an argument of another type.
            RuntimeError: the sequence is not the one that was searched.
            ValueError: a number out of range; a fraction of an unknown number of steps in `refresh`, or a map too large
                for an index.
        """
        check_call(layout, run, layer, state, device, samples, heads)
        aligned = layout.aligned(self.block)
        refreshes = self.refresh_steps(run.total)
        due = sum(step <= run.index + 1 for step in refreshes)
        last = due == len(refreshes)  # then nobody reads the lse any more
        if "index" not in state:
            # copies from and to page-locked memory do not wait
            pinned = self.offload_state and device.type == "cuda"
            home = torch.device("cpu") if self.offload_state else device
            index, lse = self._allocate(aligned, samples, heads, home, pinned, keep_lse=not last)
            state.update(index=index, lse=lse, done=due)
            return self._plan(Mode.SEARCH, aligned, index, lse)
        index = state["index"]
        check_same_size("AdaSpa", index, aligned, run, samples, heads)
        if due > state["done"]:
            lse = state["lse"]
            state.update(done=due, lse=None if last else lse)
            return self._plan(Mode.REFRESH, aligned, index, lse)
        return self._plan(Mode.SPARSE, aligned, index, None)

    def _plan(self, mode: Mode, layout: TokenLayout, index: PackedIndex, lse: torch.Tensor | None) -> LayerPlan:
        selection = self.selection(layout)
        return LayerPlan(mode, layout, index, lse=lse, selection=selection, offloaded=self.offload_state)

    def _allocate(
        self,
        layout: TokenLayout,
        samples: int,
        heads: int,
        device: torch.device,
        pinned: bool = False,
        keep_lse: bool = True,
    ) -> tuple[PackedIndex, torch.Tensor | None]:
        """Buffers for the map of one layer, and for its lse where a refresh will read it."""
        capacity = self._capacity(layout, samples, heads)
        index = PackedIndex.allocate(layout, self.block, samples, heads, capacity, device, pinned)
        if not keep_lse:
            return index, None
        dtype = LSE_DTYPES[self.lse_dtype]
        with torch.inference_mode(False):  # as the index
            lse = torch.empty(samples, heads, layout.length, dtype=dtype, device=device, pin_memory=pinned)
        return index, lse

    def selection(self, layout: TokenLayout) -> Selection:
        """How many blocks the rows of a layout keep: density x video columns, rounded, at least 1."""
        rows, columns = (ceil_div(layout.video, b) for b in self.block)
        base = columns_of(self.density, columns)
        low = base
        if self.head_adaptive:
            low = max(columns_of(self.density / 2, columns), 2 * base - columns)
        # as many heads keep `high` as keep `low`: the mean is `base` to the block
        return Selection(rows, columns, base, low, 2 * base - low, self.recall_threshold, self.sample)

    def select(self, sums: torch.Tensor, layout: TokenLayout) -> BlockIndex:
        """The lists that a search would keep, from the mass of every block.

        Args:
            sums: fp32 [B, H, Mq, Nk] over `layout.aligned(block)`, as `block_sums` gives it.
            layout: the sequence.

        Raises:
            ValueError: sums of another shape or dtype.
        """
        aligned = layout.aligned(self.block)
        samples, heads = sums.shape[:2]
        capacity = self._capacity(aligned, samples, heads)
        index = PackedIndex.allocate(aligned, self.block, samples, heads, capacity, sums.device)
        select(sums, index, self.selection(aligned))
        return expand(index)

    def _capacity(self, layout: TokenLayout, samples: int, heads: int) -> int:
        rows, columns = (ceil_div(layout.length, b) for b in self.block)
        return self.selection(layout).capacity((samples, heads, rows, columns))

    def refresh_steps(self, total: int | None) -> list[int]:
        """The steps to refresh at, counted from 1, of a run of `total` steps.

        Raises:
            ValueError: a fraction, and total is None.
        """
        parts = (part_of_run("refresh", value, total, "steps") for value in self.refresh)
        # a fraction of the run is reached a rounding error early
        return [max(1, math.ceil(part - 1e-6)) for part in parts]

    def check_run(self, schedule: DenseSchedule, total: int | None) -> None:
        """Raise ValueError where a refresh is not after the search, never comes, or is a fraction of an unknown number.

        A run whose last sparse step searches has nothing to refresh, whatever was asked.
        """
        first, last = schedule.dense_steps(total)
        search = max(1, first)
        steps = self.refresh_steps(total)
        if total is not None and search >= total - last:
            return
        for value, step in zip(self.refresh, steps, strict=True):
            if isinstance(value, int) and total is not None and step > total - last:
                raise ValueError(
                    f"refresh={value} is a step that is not sparse: {total - last} of {total} is the last one; refresh "
                    "earlier, or give a fraction of the run."
                )
            if step <= search and first < 2:
                raise ValueError(f"refresh={value} is step {step}, and step 1 searches; refresh at step 2 or later.")
            if step <= search:
                of_run = "" if total is None else f" of {total}"
                raise ValueError(
                    f"refresh={value} is step {step}{of_run}, which is not after the search at step {search}, the last "
                    f"dense one of first_steps={schedule.first_steps}; refresh later, not at all "
                    "(refresh=()), or lower first_steps."
                )

    def densities(self, layout: TokenLayout) -> tuple[float, float]:
        """(kept / all blocks, the same among video blocks) of every map: heads differ, their mean does not."""
        aligned = layout.aligned(self.block)
        return self.selection(aligned).densities(tuple(ceil_div(aligned.length, b) for b in self.block))

    def search_work(self, schedule: DenseSchedule, total: int, experts: int) -> tuple[int, float]:
        """What searching costs a layer over a run: (steps dense on top of the schedule, passes in dense forwards).

        Every expert searches at its own first step, which is one of the schedule's dense steps for the first expert
        only, and not even then where the schedule has none.
        """
        first, last = schedule.dense_steps(total)
        end = total - last
        if max(1, first) >= end:  # no sparse step is left to search for
            return max(0, end - first), 0.0
        passes = experts + sum(max(1, first) < step <= end for step in set(self.refresh_steps(total)))
        share = 1.0 if self.sample is None else self.sample / self.block[0]
        return experts - (first > 0), passes * LOOK_SHARE * share

    def state_bytes(self, layout: TokenLayout, samples: int, heads: int) -> dict[str, int]:
        """Memory kept between steps for one layer: its lse, the bits of its map, and where its lists start."""
        aligned = layout.aligned(self.block)
        index, lse = self._allocate(aligned, samples, heads, torch.device("meta"), keep_lse=bool(self.refresh))
        lists = index.bytes - index.bits.numel()
        return {
            "lse": 0 if lse is None else lse.numel() * lse.element_size(),
            "bits": index.bits.numel(),
            "lists": lists,
        }


def _check_refresh(value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a step from 1 on, or a fraction of the run."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"refresh must be made of numbers (got {value!r}).")
    if value < 1 if isinstance(value, int) else not 0 < value <= 1:
        raise ValueError(f"refresh must be made of steps from 1 on, or fractions of the run in 0..1 (got {value}).")
