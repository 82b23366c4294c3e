"""The copy engine of Hopper (TMA): which tensors it reads, and how it is told about them."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

ALIGNMENT = 16
"""Bytes that addresses and strides of a descriptor are multiples of."""


def is_aligned(x: torch.Tensor) -> bool:
    """Whether descriptors take x [B, L, H, D] as it is. The stride along a dimension of 1 is not used."""
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % ALIGNMENT == 0 and all(step > 0 and step % ALIGNMENT == 0 for step in steps)


def describe(x: torch.Tensor, rows: int, columns: int) -> Any:
    """A descriptor of an aligned tensor [B, L, H, D], seen as [B, H, L, D], for copies of [rows, columns] of one head.

    It is Gluon's; the copies are swizzled by rows of 128 bytes.
    """
    descriptor, layout = _gluon()
    batch, length, heads, head_dim = x.shape
    by_batch, by_token, by_head = (
        n if size > 1 else head_dim for n, size in zip(x.stride()[:3], x.shape, strict=False)
    )
    shape, strides = [batch, heads, length, head_dim], [by_batch, by_head, by_token, 1]
    return descriptor(x, shape, strides, [1, 1, rows, columns], layout)


@cache
def _gluon() -> tuple[Any, Any]:
    """Gluon's class of descriptors, and the layout of 16-bit tiles."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor, NVMMASharedLayout(128, 16, 4)


def with_room_for_descriptors(device: torch.device, launch: Callable[[], None]) -> None:
    """Launch a kernel that makes descriptors itself, for which Triton asks an allocator for memory."""
    # the allocator belongs to a context: this one is left when the launch returns, whoever set which before
    contextvars.copy_context().run(_with_allocator, device, launch)


def _with_allocator(device: torch.device, launch: Callable[[], None]) -> None:
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    launch()
