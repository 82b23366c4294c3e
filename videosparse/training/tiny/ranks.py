"""The processes that train one model together, one a GPU: who is first, what they agree on, how gradients add up."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than anything that the first does alone: held-out losses, samples, a save.
PATIENCE = timedelta(minutes=5)
# Between two looks whether all still have the same weights.
REUNITE_STEPS = 500


@dataclass(frozen=True)
class Ranks:
    """One of the processes that `torchrun` started on this host, or the only one.

    Args:
        rank: of this process; the first, 0, alone logs, looks at held-out clips and writes.
        size: how many there are.

    Each of them draws its own clips, holds all weights, and makes every step with the mean of all gradients. Whatever
    decides how they go on (clock, signals) is agreed on first, so that none waits for a step that another never makes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_launcher(cls) -> Ranks:
        """As the environment says that `torchrun` makes; nobody talks before `join`.

        Raises:
            ValueError: the processes are on more than one host, whose folders may differ.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size != int(os.environ.get("LOCAL_WORLD_SIZE", size)):
            raise ValueError(f"all processes must be on one host (got {size} on several); use torchrun --nnodes 1.")
        return cls(rank, size)

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def join(self, cuda: bool) -> None:
        """Meet the others: by NCCL on GPUs, by gloo for what lives on the host."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)

    def leave(self) -> None:
        """Part from the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether one of them says so. All must ask; the answer is the same for all."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def of_first(self, value: float) -> float:
        """The value that the first has. All must ask."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def reunite(self, tensors: Sequence[Tensor]) -> float:
        """Give all processes the values of the first; returns how far the furthest was from them, relatively.

        Equal gradients do not make equal weights for ever: a kernel may round by how its memory is aligned.
        """
        if self.size == 1:
            return 0.0
        away = total = 0.0
        for tensor in tensors:
            # NCCL wants it contiguous; weights of a channels-last VAE are not
            right = tensor.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(right, 0)
            away += float((tensor.detach() - right).double().square().sum())
            total += float(right.double().square().sum())
            tensor.detach().copy_(right)
        furthest = torch.tensor(math.sqrt(away / max(total, 1e-30)), dtype=torch.float64)
        dist.all_reduce(furthest, dist.ReduceOp.MAX)
        return float(furthest)

    def mean_(self, tensor: Tensor) -> None:
        """Make a tensor the mean of all, in place, on its device's stream."""
        if self.size > 1:
            # gloo has no mean
            dist.all_reduce(tensor)
            tensor.mul_(1 / self.size)
