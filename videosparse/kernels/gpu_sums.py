"""Which kernel computes block sums on a GPU: the one for Hopper where it suits, else the one for any GPU."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch

from videosparse.kernels import triton_sums
from videosparse.kernels.call import AttentionCall

logger = logging.getLogger("videosparse")


_failed: set[torch.device] = set()
"""Devices whose Hopper kernel did not compile."""


def block_sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: AttentionCall, block: tuple[int, int]
) -> torch.Tensor:
    """Attention mass of every block, fp32 [B, H, Mq, Nk]; see `kernels.block_sums`."""
    hopper = _hopper_kernel(q.device)
    if hopper is not None and q.device not in _failed and hopper.unsuited(q, k, call) is None:
        try:
            sums: torch.Tensor = hopper.block_sums(q, k, lse, call, block)
            return sums
        except hopper.CompilationError as error:
            _failed.add(q.device)
            _warn(f"cannot be compiled: {error}")
    return triton_sums.block_sums(q, k, lse, call, block)


@cache
def _hopper_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel for Hopper, None on other devices."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from videosparse.kernels import hopper_sums
    except Exception as error:  # Gluon, which it is written in, is an experimental part of Triton
        _warn(f"cannot be imported: {type(error).__name__}: {error}")
        return None
    return hopper_sums


def _warn(what: str) -> None:
    logger.warning("block_sums takes its portable Triton kernel, which is slower: the one for Hopper %s.", what)
