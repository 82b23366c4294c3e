"""Looking at the self-attentions of a pipeline while it generates densely: what calibration is made from.

A `Watch` puts dense attention on a pipeline and looks at some of its denoising steps. Where it looks, every layer's
queries and keys are judged in all token orders, and the inputs of the transformer are kept; so that later, when orders
are chosen, the same calls can be made again for the sums of blocks in these orders, without another denoising run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from videosparse.attach import RunTracker, restore, sparsify, tracker_of
from videosparse.components import targets
from videosparse.generation.errors import GenerationError
from videosparse.kernels import attend, block_sums
from videosparse.kernels.order_search import ORDERS, OrderMetric, choose, holdings, in_order, look, sums_by_order
from videosparse.kernels.selection import columns_of
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.policies.base import LayerPlan
from videosparse.processors import DenseProcessor

Look = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, TokenLayout], None]
"""Called with a layer's number, q and k [B, L, H, D], lse fp32 [B, H, L] and the layout."""

StepsOf = Callable[[int, int | None], Mapping[int, int]]
"""Called with an expert's number and how many steps it makes; the bucket of each of its steps to look at."""


@dataclass(frozen=True)
class Call:
    """One forward of a transformer that was looked at.

    Args:
        bucket: part of the run that it stands for.
        inputs: by name; tensors on the CPU, else plain values.
        expert: number of the transformer, where two share a run.
    """

    bucket: int
    inputs: Mapping[str, Any]
    expert: int = 0


class Figures:
    """How the orders do in every layer and head by the paper's metric, added up over calls.

    Args:
        layers, heads: of the model; layers of all experts.
        metric: how orders are judged.
        experts: that layers are of, as many of each.

    Attributes:
        totals: fp64 [layers, heads, 6] for each name, sums of M_sparse ("sparse") and M_quant ("uneven").
        calls: of each expert, how many were added up, per layer.
    """

    names: ClassVar[tuple[str, ...]] = ("sparse", "uneven")

    def __init__(self, layers: int, heads: int, metric: OrderMetric, experts: int = 1) -> None:
        self.metric = metric
        self.totals = {name: torch.zeros(layers, heads, len(ORDERS), dtype=torch.float64) for name in self.names}
        self.calls = [0] * experts

    @property
    def means(self) -> tuple[torch.Tensor, ...]:
        """M_sparse and M_quant, fp64 [6, layers x heads], means over calls: what `choose` takes."""
        layers, heads, _ = self.totals[self.names[0]].shape
        calls = torch.tensor(self.calls, dtype=torch.float64).repeat_interleave(layers // len(self.calls))
        means = (self.totals[name].movedim(2, 0) / calls[:, None] for name in self.names)
        return tuple(x.reshape(-1, layers * heads) for x in means)

    @property
    def codes(self) -> torch.Tensor:
        """The best order of every head, uint8 [layers, heads]."""
        layers, heads, _ = self.totals[self.names[0]].shape
        return self._best().view(layers, heads).to(torch.uint8)

    def _best(self) -> torch.Tensor:
        """int64 [layers x heads]."""
        sparse, uneven = self.means
        return choose(sparse, uneven, self.metric.alpha)

    def __call__(self, number: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: TokenLayout) -> None:
        """Add a call of a layer; a `Look`.

        Raises:
            GenerationError: the figures are no numbers.
        """
        for looks in look(q, k, lse, layout.grid, (64, 64), metric=self.metric):
            for name, total in self.totals.items():
                found = torch.stack([getattr(one, name).mean(0) for one in looks], 1).double().cpu()
                _check_numbers(found, number)
                total[number, looks[0].heads] += found


class Shares(Figures):
    """How much of the attention the blocks of a map would hold in every order, layer and head, added up over calls.

    In each call the map is that call's own best, while the maps of a plan serve all calls of their part of a run.

    Args:
        layers, heads, experts: see `Figures`.
        block: (query rows, key rows) of the maps.
        density: share of the video blocks that every row keeps.

    Attributes:
        totals: fp64 [layers, heads, 6], sums of the share held ("kept").
    """

    names: ClassVar[tuple[str, ...]] = ("kept",)

    def __init__(self, layers: int, heads: int, block: tuple[int, int], density: float, experts: int = 1) -> None:
        super().__init__(layers, heads, OrderMetric(by="mass"), experts)
        self.block, self.density = block, density

    def _best(self) -> torch.Tensor:
        """int64 [layers x heads]; of equal ones the first, raster order before all others."""
        return self.means[0].argmax(0)

    def __call__(self, number: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: TokenLayout) -> None:
        """Add a call of a layer; a `Look`.

        Raises:
            GenerationError: the shares are no numbers.
        """
        count = columns_of(self.density, ceil_div(layout.grid.tokens, self.block[1]))
        found = torch.empty(q.shape[2], len(ORDERS), dtype=torch.float32, device=q.device)
        for one in holdings(q, k, lse, layout.grid, self.block, count):
            found[one.heads, one.code] = one.share.mean(0)
        shares = found.double().cpu()
        _check_numbers(shares, number)
        self.totals["kept"][number] += shares


class Columns(Figures):
    """How many blocks a row has to keep for a share of the attention in every order, layer and head, added up.

    As `Shares`, but with the share given and the blocks to be found.

    Args:
        layers, heads, block, experts: see `Shares`.
        mass: share of the attention among video tokens.

    Attributes:
        totals: fp64 [layers, heads, 6], sums of the columns kept ("columns").
    """

    names: ClassVar[tuple[str, ...]] = ("columns",)

    def __init__(self, layers: int, heads: int, block: tuple[int, int], mass: float, experts: int = 1) -> None:
        super().__init__(layers, heads, OrderMetric(by="mass"), experts)
        self.block, self.mass = block, mass

    def _best(self) -> torch.Tensor:
        """int64 [layers x heads]; of equal ones the first, raster order before all others."""
        return self.means[0].argmin(0)

    def __call__(self, number: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: TokenLayout) -> None:
        """Add a call of a layer; a `Look`.

        Raises:
            GenerationError: the sums are no numbers.
        """
        found = torch.empty(q.shape[2], len(ORDERS), dtype=torch.float64)
        for heads, code, sums in sums_by_order(q, k, lse, layout.grid, self.block):
            found[heads, code] = columns_for(sums, self.mass).mean(0).cpu()
        _check_numbers(found, number)
        self.totals["columns"][number] += found


def columns_for(sums: torch.Tensor, mass: float) -> torch.Tensor:
    """How many of the largest blocks of every row hold a share of sums [..., M, N]; fp64 [...], NaN where all is 0.

    In parts of a block, as if the last one filled evenly: orders that need as many whole ones still differ.
    """
    held = sums.sort(-1, descending=True).values.sum(-2, dtype=torch.float64).cumsum(-1)
    wanted = mass * held[..., -1:] * (1 - 1e-12)  # rounding must not make a share of all unreachable
    last = (held >= wanted).int().argmax(-1, keepdim=True)
    more = torch.diff(held, dim=-1, prepend=torch.zeros_like(held[..., :1])).gather(-1, last)
    return (last + 1 - (held.gather(-1, last) - wanted) / more)[..., 0]


class MapSums:
    """The mass of every video block in the orders that were chosen, added up over calls.

    Args:
        codes: uint8 [layers, heads], of one transformer.
        grid: of the video.
        block: (query rows, key rows).
        first: number that the watch gives to the first of the layers.

    Attributes:
        sums: fp32 [layers, heads, rows, columns] on the CPU.
    """

    def __init__(self, codes: torch.Tensor, grid: VideoGrid, block: tuple[int, int], first: int = 0) -> None:
        self.codes, self.grid, self.block, self.first = codes, grid, block, first
        rows, columns = (ceil_div(grid.tokens, b) for b in block)
        self.sums = torch.zeros(*codes.shape, rows, columns, dtype=torch.float32)

    def __call__(self, number: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: TokenLayout) -> None:
        """Add a call of a layer; a `Look`."""
        video, own_number = self.grid.tokens, number - self.first
        for code in sorted(set(self.codes[own_number].tolist())):
            heads = (self.codes[own_number] == code).nonzero()[:, 0]
            own = heads.to(q.device)
            moved_q, moved_k = (in_order(x[:, :video].index_select(2, own), self.grid, code, 1) for x in (q, k))
            level = in_order(lse[:, :, :video].index_select(1, own), self.grid, code, 2)
            sums = block_sums(moved_q, moved_k, level, layout=TokenLayout(self.grid), block=self.block)
            found = sums.mean(0).cpu()
            _check_numbers(found, number)
            self.sums[own_number, heads] += found


def _check_numbers(x: torch.Tensor, layer: int) -> None:
    if not bool(x.isfinite().all()):
        raise GenerationError(
            f"Self-attention {layer} gave statistics that are not finite (NaN or infinity), so nothing can be chosen "
            "from them; try --dtype bf16 or fp32, or check the model's weights."
        )


class Watch:
    """Runs a pipeline densely and looks at some of its steps; use `watching`.

    Self-attentions are numbered through all transformers that share the run.

    Args:
        pipe: bound by `sparsify`.
        device: that it runs on.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.transformers = targets(pipe)[1]
        self.trackers: list[RunTracker] = [tracker_of(transformer) for transformer in self.transformers]
        self.layout: TokenLayout | None = None
        self._look: Look | None = None
        self._steps: StepsOf | None = None
        self._figures: Figures | None = None
        self._calls: list[Call] = []

    @property
    def tracker(self) -> RunTracker:
        """That of the first transformer."""
        return self.trackers[0]

    @property
    def layers(self) -> int:
        """Self-attentions of all transformers."""
        return sum(len(tracker.layers) for tracker in self.trackers)

    def run(self, steps: Mapping[int, int] | StepsOf, figures: Figures, arguments: Mapping[str, Any]) -> list[Call]:
        """Generate once, looking at some steps.

        Args:
            steps: bucket of each step to look at; or, asked once the number of steps that an expert makes is known,
                the same of its own steps, counted from its first.
            figures: what every call that is looked at is added to.
            arguments: of the pipeline; frames are not decoded.

        Returns:
            The calls that were looked at.
        """
        self._steps = steps if callable(steps) else lambda expert, total: steps
        self._figures, self._calls = figures, []
        try:
            self.pipe(**{**arguments, "output_type": "latent"})
        finally:
            self._steps, self._figures, self._look = None, None, None
        for call in self._calls:
            figures.calls[call.expert] += 1
        return self._calls

    def replay(self, calls: Iterable[Call], look: Look) -> None:
        """Make calls again, and look at every layer."""
        self._look = look
        try:
            with torch.no_grad():
                for call in calls:
                    inputs = {name: _to(value, self.device) for name, value in call.inputs.items()}
                    self.transformers[call.expert](**inputs)
        finally:
            self._look = None
            for tracker in self.trackers:
                tracker.end_run()

    def before_forward(
        self, expert: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Decide whether a forward is looked at (a torch forward pre-hook, after the tracker's own)."""
        if self._figures is None or self._steps is None:
            return
        clock = self.trackers[expert].session.clock
        first, total = (0, clock.total()) if len(self.trackers) == 1 else clock.part(expert) or (0, clock.total())
        bucket = self._steps(expert, total).get(clock.index - first)
        self._look = None if bucket is None else self._figures
        if bucket is not None:
            names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            self._calls.append(Call(bucket, {name: _kept(name, value) for name, value in inputs.items()}, expert))

    def core(
        self, number: int, original: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LayerPlan
    ) -> torch.Tensor:
        """Stands in for `LayerProcessor.core`."""
        if self._look is None:
            out: torch.Tensor = original(q, k, v, plan)
            return out
        self.layout = plan.layout
        out, lse = attend(q, k, v, layout=plan.layout, return_lse=True)
        self._look(number, q, k, lse, plan.layout)
        return out


@contextmanager
def watching(pipe: Any, device: torch.device) -> Iterator[Watch]:
    """A `Watch` on a pipeline, which has its own attention back afterwards."""
    sparsify(pipe, DenseProcessor())
    try:
        watch = Watch(pipe, device)
        layers = (layer for tracker in watch.trackers for _, layer in tracker.layers)
        for number, layer in enumerate(layers):
            vars(layer)["core"] = partial(watch.core, number, layer.core)
        handles = [
            transformer.register_forward_pre_hook(partial(watch.before_forward, expert), with_kwargs=True)
            for expert, transformer in enumerate(watch.transformers)
        ]
        try:
            yield watch
        finally:
            for handle in handles:
                handle.remove()
    finally:
        restore(pipe)


def _kept(name: str, value: Any) -> Any:
    """An input to be passed again later: tensors as copies on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise GenerationError(f"The transformer gets a {type(value).__name__} as {name}, which calibration cannot keep.")


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
