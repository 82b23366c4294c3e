"""Which Triton kernel runs a call: on Hopper the one made for it, where it takes the call, else the portable one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import ModuleType

import torch

from videosparse.kernels.call import AttentionCall

logger = logging.getLogger("videosparse")

_portable_only = False


@contextmanager
def portable_only() -> Iterator[None]:
    """Leave special kernels out, for tests and benchmarks of the portable one."""
    global _portable_only
    before, _portable_only = _portable_only, True
    try:
        yield
    finally:
        _portable_only = before


def portable() -> bool:
    """Whether special kernels are left out at the moment."""
    return _portable_only


@cache
def hopper_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel for Hopper, None on other devices.

    Gluon, which it is written in, is an experimental part of Triton: where that has changed, it says so once.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from videosparse.kernels import hopper_forward
    except Exception as error:
        _warn(f"cannot be imported: {type(error).__name__}: {error}")
        return None
    return hopper_forward


def runs_hopper(device: torch.device) -> bool:
    """Whether the kernel for Hopper runs here: on this card, and with this Triton as far as was tried."""
    return hopper_kernel(device) is not None and device not in _failed


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one: kernels start on the current device's stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of checked tensors [B, L, H, D] on a GPU, or on the CPU where Triton interprets.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.
    """
    from videosparse.kernels import triton_forward

    special = None if _portable_only else hopper_kernel(q.device)
    with on_device(q):
        if special is not None and _takes(special, q, k, v, call):
            try:
                return special.forward(q, k, v, call, need_lse)  # type: ignore[no-any-return]
            except special.GluonError as error:
                _failed.add(q.device)
                _warn(f"cannot be compiled: {error}")
        return triton_forward.forward(q, k, v, call, need_lse)


_failed: set[torch.device] = set()
"""Devices whose Hopper kernel did not compile."""


def _takes(special: ModuleType, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> bool:
    if q.device in _failed:
        return False
    reason = special.unsuited(q, k, v, call)
    if reason is not None:
        _tell(reason)
    return reason is None


@cache
def _tell(reason: str) -> None:
    """Cached, so that a reason is logged once."""
    logger.info("attend takes its portable Triton kernel instead of the one for Hopper: %s.", reason)


def _warn(what: str) -> None:
    logger.warning(
        "attend takes its portable Triton kernel, which is slower: the one for Hopper %s. Triton 3.6 to 3.9 are known "
        "to work.",
        what,
    )
