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
from typing import Any

import torch

from videosparse.attach import RunTracker, restore, sparsify, tracker_of
from videosparse.generation.errors import GenerationError
from videosparse.kernels import attend, block_sums
from videosparse.kernels.order_search import ORDERS, OrderMetric, in_order, look
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.base import LayerPlan
from videosparse.processors import DenseProcessor

Look = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, TokenLayout], None]
"""Called with a layer's number, q and k [B, L, H, D], lse fp32 [B, H, L] and the layout."""


@dataclass(frozen=True)
class Call:
    """One forward of a transformer that was looked at.

    Args:
        bucket: part of the run that it stands for.
        inputs: by name; tensors on the CPU, else plain values.
    """

    bucket: int
    inputs: Mapping[str, Any]


class Figures:
    """How the orders do in every layer and head, added up over calls.

    Args:
        layers, heads: of the model.
        metric: how orders are judged.

    Attributes:
        sparse, uneven: fp64 [layers, heads, 6], sums of M_sparse and M_quant.
        calls: how many were added up, per layer.
    """

    def __init__(self, layers: int, heads: int, metric: OrderMetric) -> None:
        self.metric = metric
        self.sparse = torch.zeros(layers, heads, len(ORDERS), dtype=torch.float64)
        self.uneven = torch.zeros_like(self.sparse)
        self.calls = 0

    def __call__(self, number: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: TokenLayout) -> None:
        """Add a call of a layer; a `Look`.

        Raises:
            GenerationError: the figures are no numbers.
        """
        for looks in look(q, k, lse, layout.grid, (64, 64), metric=self.metric):
            for total, name in ((self.sparse, "sparse"), (self.uneven, "uneven")):
                found = torch.stack([getattr(one, name).mean(0) for one in looks], 1).double().cpu()
                _check_numbers(found, number)
                total[number, looks[0].heads] += found


class MapSums:
    """The mass of every video block in the orders that were chosen, added up over calls.

    Args:
        codes: uint8 [layers, heads].
        grid: of the video.
        block: (query rows, key rows).

    Attributes:
        sums: fp32 [layers, heads, rows, columns] on the CPU.
    """

    def __init__(self, codes: torch.Tensor, grid: VideoGrid, block: tuple[int, int]) -> None:
        self.codes, self.grid, self.block = codes, grid, block
        rows, columns = (-(-grid.tokens // b) for b in block)
        self.sums = torch.zeros(*codes.shape, rows, columns, dtype=torch.float32)

    def __call__(self, number: int, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, layout: TokenLayout) -> None:
        """Add a call of a layer; a `Look`."""
        video = self.grid.tokens
        for code in sorted(set(self.codes[number].tolist())):
            heads = (self.codes[number] == code).nonzero()[:, 0]
            own = heads.to(q.device)
            moved_q, moved_k = (in_order(x[:, :video].index_select(2, own), self.grid, code, 1) for x in (q, k))
            level = in_order(lse[:, :, :video].index_select(1, own), self.grid, code, 2)
            sums = block_sums(moved_q, moved_k, level, layout=TokenLayout(self.grid), block=self.block)
            found = sums.mean(0).cpu()
            _check_numbers(found, number)
            self.sums[number, heads] += found


def _check_numbers(x: torch.Tensor, layer: int) -> None:
    if not bool(x.isfinite().all()):
        raise GenerationError(
            f"Self-attention {layer} gave statistics that are not finite (NaN or infinity), so nothing can be chosen "
            "from them; try --dtype bf16 or fp32, or check the model's weights."
        )


class Watch:
    """Runs a pipeline densely and looks at some of its steps; use `watching`.

    Args:
        pipe: with one transformer, bound by `sparsify`.
        device: that it runs on.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.tracker: RunTracker = tracker_of(pipe.transformer)
        self.layout: TokenLayout | None = None
        self._look: Look | None = None
        self._steps: dict[int, int] = {}
        self._figures: Look | None = None
        self._calls: list[Call] = []

    @property
    def layers(self) -> int:
        """Self-attentions of the transformer."""
        return len(self.tracker.layers)

    def run(self, steps: Mapping[int, int], figures: Figures, arguments: Mapping[str, Any]) -> list[Call]:
        """Generate once, looking at some steps.

        Args:
            steps: bucket of each step to look at.
            figures: what every call that is looked at is added to.
            arguments: of the pipeline; frames are not decoded.

        Returns:
            The calls that were looked at.
        """
        self._steps, self._figures, self._calls = dict(steps), figures, []
        try:
            self.pipe(**{**arguments, "output_type": "latent"})
        finally:
            self._steps, self._figures, self._look = {}, None, None
        figures.calls += len(self._calls)
        return self._calls

    def replay(self, calls: Iterable[Call], look: Look) -> None:
        """Make calls again, and look at every layer."""
        self._look = look
        try:
            with torch.no_grad():
                for call in calls:
                    inputs = {name: _to(value, self.device) for name, value in call.inputs.items()}
                    self.pipe.transformer(**inputs)
        finally:
            self._look = None
            self.tracker.end_run()

    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide whether a forward is looked at (a torch forward pre-hook, after the tracker's own)."""
        if self._figures is None:
            return
        bucket = self._steps.get(self.tracker.session.clock.index)
        self._look = None if bucket is None else self._figures
        if bucket is not None:
            names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            self._calls.append(Call(bucket, {name: _kept(name, value) for name, value in inputs.items()}))

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
        for number, (_, layer) in enumerate(watch.tracker.layers):
            vars(layer)["core"] = partial(watch.core, number, layer.core)
        handle = pipe.transformer.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
        try:
            yield watch
        finally:
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
