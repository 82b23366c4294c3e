"""What a whole model takes, from a forward of few of its layers: each kind of block times its count, and the rest."""

from __future__ import annotations

import statistics
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, field

from videosparse.benchmark.transformer import kinds_of
from videosparse.cases import MODELS, Case, ModelSpec
from videosparse.policies.base import DenseSchedule, Mode

STEP_CASES = (
    "wan2.1-14b 720x1280x81", "wan2.1-14b 720x1280x321", "hunyuan-video 720x1280x129", "hunyuan-video 720x1280x509",
    "wan2.1-14b 720x1280x161", "hunyuan-video 720x1280x253", "wan2.1-1.3b 480x832x81", "mochi 480x848x163",
)  # fmt: skip
"""What whole models are timed at, as "MODEL HEIGHTxWIDTHxFRAMES", the most valuable first."""


def case_of(text: str) -> Case:
    """The case that rows call "MODEL HEIGHTxWIDTHxFRAMES".

    Raises:
        argparse.ArgumentTypeError: it is none, or of a size that the model cannot take.
    """
    name, _, size = text.partition(" ")
    numbers = size.split("x")
    if name not in MODELS or name == "tiny-wan" or len(numbers) != 3 or not all(n.isdigit() for n in numbers):
        raise ArgumentTypeError(
            f'expected "MODEL HEIGHTxWIDTHxFRAMES", as "{STEP_CASES[0]}", of the models '
            f"{', '.join(n for n in MODELS if n != 'tiny-wan')} (got {text!r})"
        )
    height, width, frames = map(int, numbers)
    case = Case(MODELS[name], frames, height, width)
    try:
        case.layout()
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    return case


Class = tuple[str, str]
"""(kind of block, mode of its attention): what is timed once and counted."""


@dataclass
class BlockTimes:
    """Seconds of blocks and of what surrounds them, from some forwards of one contender.

    Args:
        classes: of every block of the model that was timed, in depth order.
        forwards: seconds of the timed forwards.
        blocks: for each forward, the seconds of each block.
    """

    classes: list[Class]
    forwards: list[float] = field(default_factory=list)
    blocks: list[list[float]] = field(default_factory=list)

    def add(self, forward: float, blocks: list[float]) -> None:
        """Note one forward."""
        self.forwards.append(forward)
        self.blocks.append(blocks)

    @property
    def forward(self) -> float:
        """Median seconds of a forward, as timed."""
        return statistics.median(self.forwards)

    @property
    def rest(self) -> float:
        """Median seconds of a forward outside of its blocks: embeddings, the head, planning."""
        return statistics.median(f - sum(b) for f, b in zip(self.forwards, self.blocks, strict=True))

    def by_class(self) -> dict[Class, float]:
        """Median seconds of one block of each class."""
        times: dict[Class, list[float]] = {}
        for blocks in self.blocks:
            for name, seconds in zip(self.classes, blocks, strict=True):
                times.setdefault(name, []).append(seconds)
        return {name: statistics.median(found) for name, found in times.items()}

    def text(self) -> str:
        """For a row: "KIND MODE SECONDS s xCOUNT; ..."."""
        return "; ".join(
            f"{kind} {mode} {seconds:.4f} s x{self.classes.count((kind, mode))}"
            for (kind, mode), seconds in self.by_class().items()
        )


def whole_forward(
    rest: float, times: Mapping[Class, float], spec: ModelSpec, mode: str, schedule: DenseSchedule | None = None
) -> float:
    """Seconds of a forward of the whole published model.

    Args:
        rest: seconds outside of the blocks.
        times: seconds of one block of each class.
        spec: the model.
        mode: of the attention of its layers, but for those that `schedule` leaves dense.
        schedule: whose layers are dense; None for none.

    Raises:
        ValueError: a class that the model has was not timed.
    """
    kinds = kinds_of(spec)
    total = rest
    for depth, kind in enumerate(kinds):
        dense = schedule is not None and not schedule.first_layers <= depth < len(kinds) - schedule.last_layers
        name = (kind, Mode.DENSE.value if dense else mode)
        if name not in times:
            raise ValueError(f"No {name[1]} {kind} was timed; time more layers (got {sorted(set(times))}).")
        total += times[name]
    return total


def whole_run(
    steps: int, dense_steps: int, branches: int, dense: float, sparse: float, search: float | None = None
) -> float:
    """Seconds of a run by the schedule of a method.

    Args:
        steps, dense_steps: of the run.
        branches: forwards of a step.
        dense, sparse: seconds of a forward of a dense and of a sparse step.
        search: of one that searches, and is the last of the dense steps; None where none does.
    """
    searching = 1 if search is not None and dense_steps else 0
    forwards = (dense_steps - searching) * dense + searching * (search or 0.0) + (steps - dense_steps) * sparse
    return branches * forwards
