"""One optimiser step of several processes: gradients in one buffer, their mean, the update; as CUDA graphs or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from videosparse.training.tiny.ranks import Ranks


def flat_gradients(parameters: Sequence[torch.nn.Parameter]) -> tuple[Tensor, Tensor]:
    """One fp32 buffer that holds the gradients of all parameters and a loss, and the loss in it.

    So one sum over processes carries all, and the graphs of all shapes leave gradients where the update looks for them.
    """
    # views of whole 64 bytes, as kernels over many tensors like them
    sizes = [-(-p.numel() // 16) * 16 for p in parameters]
    flat = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
    for parameter, part in zip(parameters, flat[:-1].split(sizes), strict=True):  # type: ignore[no-untyped-call]
        # laid out as the parameter, or a fused optimiser refuses it
        parameter.grad = part[: parameter.numel()].as_strided(parameter.shape, parameter.stride())
    return flat, flat[-1]


def record(work: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    """What `work` does as a graph, recorded on the stream that warmed up, in the memory of earlier ones."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


class Update:
    """The gradients of all parameters, their mean over all processes, and the optimisers' step.

    A batch shape only computes gradients (`backward`), maybe within a graph of its own; the sum over processes stands
    between that graph and the one of the optimisers, which serves all shapes.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks
    ) -> None:
        self.parameters, self.optimizers, self.ranks = list(parameters), list(optimizers), ranks
        self.gradients, self.loss = flat_gradients(self.parameters)
        self.graph: torch.cuda.CUDAGraph | None = None

    def backward(self, loss: Tensor) -> None:
        """Replace the gradients by those of a loss, and keep its value."""
        self.gradients.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        self.loss.copy_(loss.detach())

    def __call__(self) -> None:
        """Step with the mean of the gradients of all processes; `loss` becomes the mean of theirs."""
        self.ranks.mean_(self.gradients)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._apply()

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Record the optimisers' step; they must have made one."""
        self.graph = record(self._apply, stream, pool)

    def _apply(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                # a step whose gradient is not finite is skipped on the device itself
                optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            optimizer.step()
