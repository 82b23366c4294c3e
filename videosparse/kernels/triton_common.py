# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What several kernels in Triton share: where a program works, what it reads there, and how it is launched.

Imported on first use only. Shapes are those of `triton_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from videosparse.kernels.call import LOG2_E

LOG2_E_IN_KERNEL = tl.constexpr(LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-3.0e38)  # below every score, yet finite: FLOOR - FLOOR is 0, so a row without keys gives no NaN

LISTS = ["row_ptr", "ids_ptr", "order_ptr", "lens_ptr"]
"""Lists as kernels name them: they may start anywhere in a buffer, so kernels are not specialised on them."""


@triton.jit
def row_of_program(order_ptr, item, rows, heads, map_rows, map_heads, shares):
    """(row of the lists, block row, sample, head) of a piece of work: the long rows of every share of the map first."""
    long = tl.load(order_ptr + map_rows)
    early = item < long * shares
    base = tl.where(early, 0, long)
    span = tl.where(early, long, map_rows - long)
    item -= base * shares
    share = item // span
    row = tl.load(order_ptr + base + item % span)
    sharing = heads // map_heads
    head = (row // rows) % map_heads + share % sharing
    sample = row // (rows * map_heads) + share // sharing
    return row, row % rows, sample, head


@triton.jit
def is_token(position, video, text_start, end):
    """Whether positions hold valid tokens of a sample whose text ends at `end`."""
    return (position < video) | ((position >= text_start) & (position < end))


@triton.jit
def load_rows(ptr, positions, stride, valid, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Rows [positions, HEAD_PAD] of one head; 0 where not valid and past HEAD_DIM, whatever memory holds there."""
    dims = tl.arange(0, HEAD_PAD)
    pointers = ptr + positions.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM == HEAD_PAD:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def listed(ids_ptr, place):
    """The block that an entry of the lists names, int32.

    An int16 id is taken from the aligned word that it is half of: words are copied ahead of their use, as keys are,
    by an instruction that takes no less, and loads of halves would make every tile wait for its entry. The other half
    may lie outside the lists. An aligned word never crosses a page, so it can be read where the id can, and that half
    is dropped.
    """
    if ids_ptr.dtype.element_ty == tl.int16:
        address = (ids_ptr + place).to(tl.int64)
        word = tl.load((address & -4).to(tl.pointer_type(tl.int32)))
        return (word >> ((address & 2) * 8).to(tl.int32)) & 0xFFFF
    else:
        return tl.load(ids_ptr + place)


@triton.jit
def end_of_text(lens_ptr, sample, length, HAS_LENS: tl.constexpr):
    """Where the text of a sample ends, as a position."""
    end = length
    if HAS_LENS:
        end = tl.minimum(tl.load(lens_ptr + sample), length)
    return end


@dataclass(frozen=True)
class Tiles:
    """How one program works: query rows, key rows, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""Shared memory of one program by compute capability; other NVIDIA cards from 8.0 on have 99, AMD's have 64."""


def head_pad(head_dim: int) -> int:
    """The power of two, at least 16, that a head is padded to in registers."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def shared_kb(device: torch.device) -> int:
    """Shared memory of one program on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 64
    return SHARED_KB.get(torch.cuda.get_device_capability(device), 99)


def strides_of(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last, whose stride is 1; 0 along a dimension of 1, whose stride means nothing
    but selects a compile."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True))
