"""PAROAttention (arXiv 2506.16054): tokens in an order in which attention falls into blocks, and maps for it.

Read along another axis first, the same attention has far more empty blocks: a head that looks at the same place in all
frames is a set of diagonals in raster order, and a block diagonal once the frames of a place lie side by side. So every
head gets one of the six orders of the axes (frames, rows, columns), and block maps in that order. Both come from a
calibration run, in a file (`PAROPlan`); or, which is our extension, from one dense step of the very run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from videosparse.blocks import BlockIndex, PackedIndex, check_block
from videosparse.checking import check_flag, check_share
from videosparse.kernels.order_search import ORDERS, OrderMetric, OrderSelection
from videosparse.kernels.selection import Selection, columns_of, expand, select
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.ordering import AnyOrder, SearchedOrder
from videosparse.policies.base import (
    BLOCK,
    LOOK_SHARE,
    TRAINING,
    DenseSchedule,
    LayerPlan,
    LayerState,
    Mode,
    RunStep,
    SparsityPolicy,
    check_call,
    check_same_size,
)
from videosparse.policies.paro_plan import PAROPlan
from videosparse.uploading import upload

DENSITY = 0.2


@dataclass(frozen=True)
class PAROPolicy(SparsityPolicy):
    """PAROAttention: by a plan, online, or with the orders of a plan and maps found online.

    By a plan, a layer's order and map depend on the layer and the part of the run alone, so it also trains: then with
    the map of the second half of a run. Maps are on the device for this part of the run and the next. Where two experts
    share a run, each has orders and maps of its own, and its own steps are what has parts.

    Online (no plan; our extension, not in the paper): the last of the dense first steps measures all six orders, each
    head takes the one that the paper's metric likes best, or the one whose map holds most, and the map that keeps the
    largest blocks of every row in that order; both stay for the run. Every branch of guidance searches for itself;
    samples of a batch share orders, not maps.

    `online_maps`: what transfers to another resolution or length are the orders, since they name axes; maps do not. So
    a plan for another grid is refused unless its maps are replaced by those of the run's last dense step.

    Args:
        calibrated: the plan; None is online.
        density: share of the video blocks that a row keeps online, in (0, 1]; None takes the plan's, else .2.
        block: (query rows, key rows), each 64 or 128; None takes the plan's, else (128, 64).
        alpha: weight of sparsity in the choice of an order, 0..1; None takes .5. Not with a plan, which has chosen.
        online_maps: find the maps in the run, in the orders of the plan.
        order_by: how orders are chosen, one of `ORDER_BY`; None takes "metric". Not with a plan, which has chosen.

    Raises:
        TypeError, ValueError: a value of another type or out of range, or one that the plan, or another one, has
            decided.

    Source: sections 3 and 4 of the paper. Differs from it: the sign and weight of its metric (see `OrderMetric` and
    `choose`); blocks of 128x64 unless asked, while orders are judged in blocks of 64x64; text rows and columns are
    always kept, outside the density.
    """

    calibrated: PAROPlan | None = None
    density: float | None = None
    block: tuple[int, int] = None  # type: ignore[assignment]  # filled below
    alpha: float | None = None
    online_maps: bool = False
    order_by: str | None = None

    name: ClassVar[str] = "paro"

    def __post_init__(self) -> None:
        plan = self.calibrated
        if plan is not None and not isinstance(plan, PAROPlan):
            raise TypeError(f"calibrated must be a PAROPlan or None (got {type(plan).__name__}).")
        check_flag("online_maps", self.online_maps)
        if self.online_maps and plan is None:
            raise ValueError("online_maps=True keeps the orders of a plan; pass the plan, or drop online_maps.")
        self._check_given()
        if self.block is None:
            object.__setattr__(self, "block", BLOCK if plan is None else plan.facts.block)
        check_block(self.block)
        if self.searches and self.density is None:
            object.__setattr__(self, "density", DENSITY if plan is None else plan.density)
        if plan is None:
            object.__setattr__(self, "order_by", self._metric.by)
            object.__setattr__(self, "alpha", None if self.order_by == "mass" else self._metric.alpha)

    def _check_given(self) -> None:
        """Raise where a value is out of range, or not open any more."""
        plan, density = self.calibrated, self.density
        if density is not None:
            check_share("density", density)
        metric = self._metric
        if self.alpha is not None and metric.by == "mass":
            raise ValueError(
                f"alpha={self.alpha} weighs the paper's metric, and orders are to be chosen by mass; drop one of both."
            )
        if plan is None:
            return
        for name in ("alpha", "order_by"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value} chooses orders, and {plan.source} has chosen them; drop one of both.")
        if self.online_maps:
            return
        own = plan.facts.block
        if self.block is not None and tuple(self.block) != own:
            raise ValueError(f"{plan.source} has blocks of {own} (got block={self.block}); drop block.")
        if density is not None:
            raise ValueError(
                f"density={density} is not for a plan, whose maps have density {plan.density:.3f}; drop it, calibrate "
                "with --density, or pass online_maps=True."
            )

    @property
    def _metric(self) -> OrderMetric:
        """How orders are judged online."""
        given = {"alpha": self.alpha, "by": self.order_by}
        return OrderMetric(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    @property
    def pure(self) -> bool:  # type: ignore[override]  # depends on where maps come from
        """Whether nothing is kept between steps: maps come from a plan."""
        return not self.searches

    @property
    def searches(self) -> bool:  # type: ignore[override]  # likewise
        """Whether maps are found while a video is made."""
        return self.calibrated is None or self.online_maps

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
        """By the plan: sparse. Else search where nothing is kept yet, then sparse on what was found.

        Raises:
            TypeError: an argument of another type.
            ValueError: a number out of range; the plan is for another grid, or other layers or heads.
            RuntimeError: the sequence is not the one that was searched.
        """
        check_call(layout, run, layer, state, device, samples, heads)
        aligned = layout.aligned(self.block)
        if self.calibrated is not None:
            _check_fits(self.calibrated, layer, heads)
        if self.searches:
            return self._searched(aligned, run, layer, state, device, samples, heads)
        assert self.calibrated is not None
        return _planned(self.calibrated, aligned, run, layer, state, device)

    def _searched(
        self,
        layout: TokenLayout,
        run: RunStep,
        layer: int,
        state: LayerState,
        device: torch.device,
        samples: int,
        heads: int,
    ) -> LayerPlan:
        chosen = self.selection(layout)
        if "index" not in state:
            index = self._allocate(layout, chosen.counts, samples, heads, device)
            codes, order = self._order(layout, run, layer, heads, device)
            state.update(index=index, order=order)
            return LayerPlan(Mode.SEARCH, layout, index, codes=codes, selection=chosen)
        index = state["index"]
        check_same_size("PAROAttention", index, layout, run, samples, heads)
        return LayerPlan(Mode.SPARSE, layout, index, order=state["order"], selection=chosen)

    def _allocate(
        self, layout: TokenLayout, counts: Selection, samples: int, heads: int, device: torch.device
    ) -> PackedIndex:
        rows, columns = (ceil_div(layout.length, b) for b in self.block)
        capacity = counts.capacity((samples, heads, rows, columns))
        return PackedIndex.allocate(layout, self.block, samples, heads, capacity, device)

    def _order(
        self, layout: TokenLayout, run: RunStep, layer: int, heads: int, device: torch.device
    ) -> tuple[torch.Tensor, AnyOrder]:
        """(int32 [H] codes on the device, the order that they are): the plan's, or what the search will write."""
        if self.calibrated is not None:
            number = _number(self.calibrated, run, layer)
            return upload(self.calibrated.codes[number].int(), device), self.calibrated.order(number, layout.grid)
        codes = torch.zeros(heads, dtype=torch.int32, device=device)
        return codes, SearchedOrder(layout.grid, codes)

    def selection(self, layout: TokenLayout) -> OrderSelection:
        """What an online search writes: density x video columns a row, rounded, at least 1."""
        density = DENSITY if self.density is None else self.density
        return _selection(layout.grid, self.block, density, self._metric, self.calibrated is None)

    def select(self, sums: torch.Tensor, layout: TokenLayout) -> BlockIndex:
        """The lists that keep the largest blocks of every row, from their mass in whatever order.

        Args:
            sums: fp32 [B, H, Mq, Nk] over `layout.aligned(block)`.
            layout: the sequence.
        """
        aligned, (samples, heads) = layout.aligned(self.block), sums.shape[:2]
        counts = self.selection(aligned).counts
        index = self._allocate(aligned, counts, samples, heads, sums.device)
        select(sums, index, counts)
        return expand(index)

    def check_run(self, schedule: DenseSchedule, total: int | None) -> None:
        """Raise ValueError where a plan's map depends on a number of steps that nobody says."""
        if total is None and not self.searches:
            raise ValueError(
                "Which map of the plan a step reads depends on the number of steps of the run, which is unknown "
                "without a pipeline; pass num_steps= to the processor."
            )

    def check_ranks(self, *, training: bool) -> None:
        """Raise NotImplementedError: maps of a plan's orders are searched on one GPU, plans trained with on one."""
        if self.searches and self.calibrated is not None:
            raise NotImplementedError(
                "online_maps does not work with context parallelism: a plan's orders are for all heads, and a rank "
                "searches for its own. Use one GPU, or PAROProcessor() without a plan."
            )
        if training:
            raise NotImplementedError(
                "Context parallelism in training does not work with plans of PAROAttention, whose heads are dealt by "
                "work; use RadialProcessor, DenseProcessor, or data parallelism, a video a GPU."
            )

    def unlike(self, shift: float | None) -> str | None:
        """Whether the maps of the plan are for other noise levels than those of the run; see `SparsityPolicy`."""
        return None if self.searches or self.calibrated is None else self.calibrated.other_shift(shift)

    def densities(self, layout: TokenLayout) -> tuple[float, float] | None:
        """(kept / all blocks, the same among video blocks), mean over heads, of a plan over all its maps."""
        aligned = layout.aligned(self.block)
        if self.searches:
            shape = tuple(ceil_div(aligned.length, b) for b in self.block)
            return self.selection(aligned).densities(shape)
        plan = self.calibrated
        assert plan is not None
        facts = plan.facts
        every = [plan.densities(aligned, n, m) for n in range(facts.attentions) for m in range(facts.buckets + 1)]
        return sum(a for a, _ in every) / len(every), sum(b for _, b in every) / len(every)

    def search_work(self, schedule: DenseSchedule, total: int, experts: int) -> tuple[int, float]:
        """What searching costs a layer over a run: (steps dense on top of the schedule, passes in dense forwards)."""
        first, last = schedule.dense_steps(total)
        if not self.searches:
            return 0, 0.0
        if max(1, first) >= total - last:  # no sparse step is left to search for
            return max(0, total - last - first), 0.0
        looks = len(ORDERS) if self.calibrated is None else 1
        return experts - (first > 0), experts * looks * LOOK_SHARE

    def state_bytes(self, layout: TokenLayout, samples: int, heads: int) -> dict[str, int]:
        """Memory kept between steps for one layer: the bits of its map, and where its lists start.

        A plan's maps, two on the device at a time, belong to no branch or sample, and are not counted.
        """
        if not self.searches:
            return {}
        index = PackedIndex.allocate(layout.aligned(self.block), self.block, samples, heads, 1, torch.device("meta"))
        return {"bits": index.bits.numel(), "lists": index.bytes - index.bits.numel()}


def _check_fits(plan: PAROPlan, layer: int, heads: int) -> None:
    """Raise ValueError for a layer or a number of heads that a plan does not have."""
    plan.check_sizes(max(plan.facts.layers, layer + 1), heads)


def _number(plan: PAROPlan, run: RunStep, layer: int) -> int:
    """What a plan calls a layer of the transformer that is at work."""
    return run.expert * plan.facts.layers + layer


def _planned(
    plan: PAROPlan, layout: TokenLayout, run: RunStep, layer: int, state: LayerState, device: torch.device
) -> LayerPlan:
    """What a plan says about a layer at a step; `state` holds on to the maps of this part of the run and the next."""
    plan.check_grid(layout.grid)
    last, number = plan.facts.buckets, _number(plan, run, layer)
    order = plan.order(number, layout.grid)
    if run.context == TRAINING:
        # key-major lists are made of these once, not in every backward pass
        if "lists" not in state:
            state["lists"] = expand(plan.index(layout, number, last, device))
        return LayerPlan(Mode.SPARSE, layout, state["lists"], order=order)
    step, steps = run.own
    bucket = last if steps is None else plan.bucket(step, steps)
    coming = (bucket, min(bucket + 1, last))
    if state.get("maps", {}).keys() != set(coming):
        state["maps"] = {part: plan.index(layout, number, part, device) for part in coming}
    densities = plan.densities(layout, number, bucket)
    return LayerPlan(Mode.SPARSE, layout, state["maps"][bucket], order=order, densities=densities)


# the same for all layers of a forward, and asked for by each
@lru_cache(maxsize=16)
def _selection(
    grid: VideoGrid, block: tuple[int, int], density: float, metric: OrderMetric, choose: bool
) -> OrderSelection:
    rows, columns = (ceil_div(grid.tokens, b) for b in block)
    base = columns_of(density, columns)
    return OrderSelection(grid, Selection(rows, columns, base, base, base, 1.0), metric, choose)
