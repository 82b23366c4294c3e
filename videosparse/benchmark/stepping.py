"""Timing the forwards of a contender: what compiles first, then some in a row, block by block."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from videosparse.attach import tracker_of
from videosparse.benchmark.block_clock import BlockClock
from videosparse.benchmark.step_contenders import StepContender
from videosparse.benchmark.transformer import blocks_of, kind_of
from videosparse.benchmark.whole import BlockTimes
from videosparse.policies.base import Mode

Inputs = dict[str, torch.Tensor]
MOST_TIMED, MOST_SECONDS = 3, 15.0
"""Of one contender: timed forwards, and seconds after which no further one begins."""

FIRST_TIMED = 500.0
"""The timestep of the first timed forward, whose output is kept: so outputs compare, however many there were."""

MOST_DIFFERENCE = 0.02
"""Relative L2 distance that rounding in bfloat16 may make between the outputs of two dense contenders."""


@dataclass
class Stepped:
    """What the forwards of a contender gave.

    Args:
        times: of its steps.
        search: of a step that searches; None where none does.
        out: fp32, the output of the first timed forward.
        density: kept / all blocks of sparse calls, text included; 1 where there are none.
        backend: what ran attention.
        peak: bytes on the GPU, weights included; 0 off one.
    """

    times: BlockTimes
    search: BlockTimes | None
    out: torch.Tensor
    density: float
    backend: str
    peak: int


def step(model: Any, contender: StepContender, inputs: Inputs, warm: Inputs, kernel: str = "") -> Stepped:
    """Time the forwards of a contender that is bound to `model`.

    Args:
        model: see `bound`.
        contender: what is bound.
        inputs: of the forwards.
        warm: of a short video, for what compiles its kernels at any size: blocks that run eagerly.
        kernel: of dense attention, where it was forced, for `backend`.

    Raises:
        RuntimeError: an output that is not finite.
    """
    device = inputs["hidden_states"].device
    clock = _Steps(model, device)
    for _ in range(1 + contender.searches):  # searching, then sparse
        clock.forward(inputs if contender.compiled or contender.cached else warm)
    if not (contender.compiled or contender.cached) and contender.method != "stock":
        tracker_of(model).end_run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if contender.searches and not contender.compiled:
        clock.forward(inputs)
    clock.timestep = FIRST_TIMED
    out, forward, blocks = clock.forward(inputs)
    times = BlockTimes(classes(model, contender))
    times.add(forward, blocks)
    begin = time.perf_counter() - forward
    while len(times.forwards) < MOST_TIMED and time.perf_counter() - begin + forward < MOST_SECONDS:
        _, forward, blocks = clock.forward(inputs)
        times.add(forward, blocks)
    if not bool(out.isfinite().all()):
        raise RuntimeError(f"{contender.name}: the output is not finite.")
    density, backend = _told(model, contender, kernel)
    search = None
    if contender.searches:
        tracker_of(model).end_run()
        _, forward, blocks = clock.forward(inputs)
        search = BlockTimes(classes(model, contender))
        search.add(forward, blocks)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Stepped(times, search, out.float(), density, backend, peak)


class _Steps:
    """Forwards one after another, each of a later step: a bare transformer tells steps by their timestep."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.clock = BlockClock(blocks_of(model), device)
        self.timestep = 900.0  # of the next forward

    def forward(self, inputs: Inputs) -> tuple[torch.Tensor, float, list[float]]:
        """(output, seconds, seconds of each block)."""
        inputs["timestep"].fill_(self.timestep)
        self.timestep -= 1
        self._wait()
        with self.clock, torch.no_grad():
            start = time.perf_counter()
            out = self.model(**inputs, return_dict=False)[0]
            self._wait()
            seconds = time.perf_counter() - start
        return out, seconds, self.clock.seconds()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def classes(model: Any, contender: StepContender) -> list[tuple[str, str]]:
    """(kind, mode of the last forward) of every block."""
    kinds = [kind_of(block) for block in blocks_of(model)]
    if contender.method == "stock":
        return [(kind, Mode.DENSE.value) for kind in kinds]
    plans = [layer.plan for _, layer in tracker_of(model).layers]
    return [(kind, plan.mode.value) for kind, plan in zip(kinds, plans, strict=True) if plan is not None]


def _told(model: Any, contender: StepContender, kernel: str) -> tuple[float, str]:
    """(density, what ran attention)."""
    if contender.method == "stock":
        return 1.0, "Diffusers' own"
    report = tracker_of(model).session.processor.report()
    dense = kernel or report.dense_backend
    return report.density, f"dense {dense}" if not contender.sparse else f"{report.backend}, dense {dense}"


def difference(out: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance of an output from another."""
    return float((out - other).norm() / other.norm())
