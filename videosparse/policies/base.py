"""What a sparse-attention method is (`SparsityPolicy`), and what it decides for one layer at one step (`LayerPlan`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch

from videosparse.blocks import BlockIndex, BlockMap, PackedIndex
from videosparse.checking import check_number, check_whole, shown
from videosparse.kernels import KernelOptions
from videosparse.kernels.order_search import OrderSelection
from videosparse.kernels.selection import Selection
from videosparse.layout import TokenLayout, check_is_layout
from videosparse.ordering import AnyOrder

BLOCK = (128, 64)
"""The block (query rows, key rows) of a method that is not told one. Hopper's kernels are made for 128 query rows, and
with 64 keys they run at the rate of 128, while maps leave more out."""
LOOK_SHARE = 0.5
"""What sums of all blocks of attention cost beside a dense call of it: one of its two matrix products."""

TRAINING = "training"
"""The context of a `RunStep` that is no step of a run."""


class Mode(StrEnum):
    """What one attention call does; the only Python constant that a compiled block reads from its plan."""

    DENSE = "dense"  # reads every key
    SPARSE = "sparse"  # reads the keys that the index lists
    SEARCH = "search"  # dense; writes the index, and the lse where a refresh will read it
    REFRESH = "refresh"  # writes the index anew, by the lse of the search, then sparse


@dataclass(frozen=True)
class RunStep:
    """When we are.

    Args:
        context: branch of guidance ("cond", "uncond", "cond_uncond", or the number of the call within a step), or
            `TRAINING`; with context windows also the number of the window, each of which has maps of its own.
        index: denoising step, from 0.
        total: denoising steps of this run, None when nobody said.
        expert: number of the transformer that is at work, from 0; two share a run of Wan2.2-A14B.
        part: (first, number) of the steps of this run that it makes; None is all of them.

    Raises:
        TypeError: a value of another type.
        ValueError: a negative number, or a run of no steps.
    """

    context: str
    index: int
    total: int | None = None
    expert: int = 0
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.context, str):
            raise TypeError(f'RunStep.context must be a str, such as "cond" (got {shown(self.context)}).')
        check_whole("RunStep.index", self.index, 0)
        if self.total is not None:
            check_whole("RunStep.total", self.total)
        check_whole("RunStep.expert", self.expert, 0)
        if self.part is not None and not (isinstance(self.part, tuple) and len(self.part) == 2):
            raise TypeError(f"RunStep.part must be a tuple (first, number) of steps (got {shown(self.part)}).")

    @property
    def own(self) -> tuple[int, int | None]:
        """(index, total) among the steps that this transformer makes."""
        return (self.index, self.total) if self.part is None else (self.index - self.part[0], self.part[1])


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one layer does now.

    Args:
        mode: see `Mode`.
        layout: the sequence of this call; in sparse modes text starts on a fresh block.
        index: lists of kept blocks, or the packed map of a method that searches: written in the modes search and
            refresh, read in the modes refresh and sparse; None in dense mode.
        order: token order of q, k, v and of the index, in sparse modes; None is raster order.
        lse: [B, H, L], fp32 or bf16: written by search, read by refresh; None in the other modes.
        codes: int32 [H], the token order of each head for later calls: written by a search that chooses orders, read by
            one that keeps them; None in the other modes.
        selection: how many blocks a search keeps, and how it chooses orders; None for static maps.
        densities: (kept / all blocks, the same among video blocks) of a packed map that is not searched for.
        offloaded: whether index and lse lie in the memory of the CPU and are copied for each call.
        options: how kernels run.
    """

    mode: Mode
    layout: TokenLayout
    index: BlockIndex | PackedIndex | None = None
    order: AnyOrder | None = None
    lse: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    selection: Selection | OrderSelection | None = None
    densities: tuple[float, float] | None = None
    offloaded: bool = False
    options: KernelOptions = field(default_factory=KernelOptions)


LayerState = MutableMapping[str, Any]
"""What a method keeps for one (context, layer) between the steps of one run; the tracker owns and frees it."""


def check_call(
    layout: TokenLayout, run: RunStep, layer: int, state: LayerState, device: torch.device, samples: int, heads: int
) -> None:
    """Raise TypeError or ValueError unless these are what `SparsityPolicy.plan` takes, for calls by hand."""
    check_is_layout(layout)
    if not isinstance(run, RunStep):
        raise TypeError(f'run must be a RunStep (got {shown(run)}); pass RunStep("cond", step, steps).')
    check_whole("layer", layer, 0)
    if not isinstance(state, MutableMapping):
        raise TypeError(f"state must be a dict that is kept between steps (got {shown(state)}); begin with {{}}.")
    if not isinstance(device, torch.device):
        raise TypeError(f'device must be a torch.device (got {shown(device)}); pass torch.device("cuda").')
    check_whole("samples", samples)
    check_whole("heads", heads)


def check_same_size(
    method: str, index: PackedIndex, layout: TokenLayout, run: RunStep, samples: int, heads: int
) -> None:
    """Raise RuntimeError where a call is of another size than the one whose map was searched for."""
    if (index.q_len, *index.shape[:2]) != (layout.length, samples, heads):
        raise RuntimeError(
            f"{method} searched {index.q_len} tokens of {index.shape[0]} samples and {index.shape[1]} heads in branch "
            f"{run.context}, and now gets {layout.length} of {samples} and {heads}: one run is one size. End it first, "
            "or use RadialProcessor()."
        )


class SparsityPolicy(ABC):
    """A method and its configuration: a frozen dataclass that turns a layout and a moment into a plan.

    A policy knows no model and no step counter of its own. `pure` policies depend on the layout alone, so they also
    work in training, where forward runs again under gradient checkpointing. One that `searches` makes its maps while a
    video is made: it is asked from the last of the dense first steps on, which searches and still is dense.
    """

    name: ClassVar[str]
    pure: ClassVar[bool]
    searches: ClassVar[bool] = False
    block: tuple[int, int]

    @abstractmethod
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
        """What layer `layer` does at `run`. Called outside any graph, once per layer and forward.

        Args:
            layout: the sequence, without a gap.
            run: when we are.
            layer: number of the self-attention.
            state: what this method keeps for this branch and layer. Its values may be exchanged here, but not changed:
                where a step cache skips the layer, the tracker brings them back and asks again at the next forward.
            device: of the tensors.
            samples, heads: of q, k and v, for methods whose maps belong to one of each.

        Raises:
            TypeError, ValueError: see `check_call`; every method begins with it.
        """

    def unlike(self, shift: float | None) -> str | None:
        """What makes this policy fit a run badly, in a sentence; None where nothing does.

        Args:
            shift: of the noise schedule of the run, None where unknown.
        """
        return None

    def check_run(self, schedule: DenseSchedule, total: int | None) -> None:  # noqa: B027  static maps fit any run
        """Raise ValueError where the steps of this method do not fit a run of `total` steps under `schedule`."""

    def check_ranks(self, *, training: bool) -> None:  # noqa: B027  most methods can
        """Raise NotImplementedError where a rank that has some heads of every layer cannot plan for those alone."""

    def densities(self, layout: TokenLayout) -> tuple[float, float] | None:
        """(kept / all blocks, the same among video blocks) of maps that are searched for; None where maps tell."""
        return None

    def search_work(self, schedule: DenseSchedule, total: int, experts: int) -> tuple[int, float]:
        """What searching costs a layer over a run: (steps dense on top of the schedule, passes in dense forwards)."""
        return 0, 0.0

    def state_bytes(self, layout: TokenLayout, samples: int, heads: int) -> dict[str, int]:
        """Memory kept between steps for one layer, by what it is kept for.

        Raises:
            ValueError: the sequence is too long to be searched.
        """
        return {}

    def static_map(self, layout: TokenLayout, device: torch.device | str = "cpu") -> BlockMap | None:
        """The map that every call on this layout uses, or None for a method that searches. For plans and pictures."""
        return None

    def select(self, sums: torch.Tensor, layout: TokenLayout) -> BlockIndex:
        """Choose blocks from their attention mass fp32 [B, H, Mq, Nk]: pure tensor code, for methods that search."""
        raise NotImplementedError(f"{type(self).__name__} has static maps: it selects nothing at run time.")


def part_of_run(name: str, value: int | float, total: int | None, unit: str) -> float:
    """An int as it is, a fraction times `total`.

    Raises:
        ValueError: a fraction, and total is None.
    """
    if isinstance(value, int):
        return value
    if total is None:
        raise ValueError(
            f"{name}={value} is a fraction of the run, whose number of steps is unknown without a pipeline; "
            f"pass num_steps= to the processor, or give {name} as an int of {unit}."
        )
    return value * total


def _count(name: str, value: int | float, total: int | None) -> int:
    """Resolve an int or a fraction of `total`, rounding halves up."""
    return int(part_of_run(name, value, total, "steps") + 0.5)


@dataclass(frozen=True)
class DenseSchedule:
    """Where attention stays dense, around any policy.

    Args:
        first_steps, last_steps: denoising steps at either end of the run; an int counts steps, a float in [0, 1] is a
            fraction of the run, so that 4-, 8- and 50-step runs all work. Dense last steps remove flicker.
        first_layers, last_layers: layers at either end of the depth, ints.

    Raises:
        TypeError, ValueError: a negative number, a fraction above 1, or layers that are no ints.
    """

    first_steps: int | float = 0
    last_steps: int | float = 0
    first_layers: int = 0
    last_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("first_steps", "last_steps", "first_layers", "last_layers"):
            value = getattr(self, name)
            check_number(name, value)
            if value < 0 or (isinstance(value, float) and not value <= 1):
                raise ValueError(f"{name} must be an int >= 0 or a fraction 0..1 (got {value}).")
            if name.endswith("layers") and not isinstance(value, int):
                raise TypeError(f"{name} must be an int of layers (got {value!r}).")

    def check_layers(self, layers: int) -> None:
        """Raise ValueError when more layers are to be dense than the model has."""
        wanted = self.first_layers + self.last_layers
        if wanted > layers:
            raise ValueError(
                f"first_layers + last_layers asks for {wanted} dense layers, the model has {layers}; lower them, "
                "or use DenseProcessor() for all."
            )

    def dense_steps(self, total: int | None) -> tuple[int, int]:
        """(first, last) dense steps of a run of `total` steps.

        Raises:
            ValueError: a fraction, or last steps, with `total` unknown.
        """
        first = _count("first_steps", self.first_steps, total)
        last = _count("last_steps", self.last_steps, total)
        if last and total is None:
            raise ValueError("last_steps needs the number of steps of the run; pass num_steps= to the processor.")
        return first, last

    def is_dense(self, run: RunStep, layer: int, layers: int) -> bool:
        """Whether `layer` of `layers` is dense at `run`."""
        if layer < self.first_layers or layer >= layers - self.last_layers:
            return True
        first, last = self.dense_steps(run.total)
        return run.index < first or (run.total is not None and run.index >= run.total - last)

    def is_last_sparse(self, run: RunStep) -> bool:
        """Whether the transformer that is at work makes no sparse step of this run after this one."""
        if run.total is None:
            return False
        end = run.total - self.dense_steps(run.total)[1]
        return run.index + 1 >= (end if run.part is None else min(end, sum(run.part)))

    def searches_at(self, run: RunStep, layer: int, layers: int) -> bool:
        """Whether a method that searches does so at a step that is dense by schedule: the last of the first ones."""
        first, _ = self.dense_steps(run.total)
        return run.index == first - 1 and not self.is_dense(replace(run, index=first), layer, layers)

    def average_density(self, density: float, total: int, layers: int) -> float:
        """Attention work of a run over a dense one, 0..1: (T_d + (T - T_d) (L_d + (L - L_d) density) / L) / T."""
        dense_steps = min(total, sum(self.dense_steps(total)))
        dense_layers = min(layers, self.first_layers + self.last_layers)
        sparse_step = (dense_layers + (layers - dense_layers) * density) / layers
        return (dense_steps + (total - dense_steps) * sparse_step) / total
