# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Tokens in another order by one copy, in Triton. Imported on first use only.

Shapes
    x        [B, L, H, D] by strides, contiguous along D; offsets are 64-bit
    out      [B, L, H, D] by strides, likewise
    table    int32 [H, 8], see `ordering.axis_table`

One program owns one raster token with all its heads: one side of the copy is whole rows of memory, the other is pieces
of a head each. Only that way round the position of a head costs a multiplication per axis instead of divisions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from videosparse.kernels import gpu
from videosparse.kernels.steps import Steps
from videosparse.kernels.triton_common import strides_of


@triton.jit
def load_steps(table_ptr, FIRST: tl.constexpr, PART: tl.constexpr, HEADS: tl.constexpr):
    """(sf, sh, sw) of heads FIRST.., int32 [PART] each."""
    head = FIRST + tl.arange(0, PART)
    mask = head < HEADS
    row = table_ptr + head * 8
    return tl.load(row, mask, 0), tl.load(row + 1, mask, 0), tl.load(row + 2, mask, 0)


@triton.jit
def place_of(token, steps, height, width):
    """Where each head puts a raster token, int32 [PART]."""
    sf, sh, sw = steps
    return token // (height * width) * sf + token // width % height * sh + token % width * sw


@triton.jit
def _move(
    x_ptr, out_ptr, place, stride_place, stride_xh, stride_oh, FIRST: tl.constexpr, PART: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Copy heads FIRST.. of one token."""
    head = (FIRST + tl.arange(0, PART)).to(tl.int64)
    column = tl.arange(0, PAD)
    mask = tl.full([PART, PAD], True, tl.int1)
    if FIRST + PART > HEADS:
        mask = mask & (head < HEADS)[:, None]
    if DIM < PAD:
        mask = mask & (column < DIM)[None, :]
    moved = place.to(tl.int64) * stride_place
    source = head * stride_xh
    target = head * stride_oh
    if INVERSE:
        source += moved
    else:
        target += moved
    values = tl.load(x_ptr + source[:, None] + column[None, :], mask=mask)
    tl.store(out_ptr + target[:, None] + column[None, :], values, mask=mask)


# sizes change from call to call: specialising on them would compile again and again
@triton.jit(do_not_specialize=["video", "height", "width"])
def reorder_kernel(
    x_ptr,
    out_ptr,
    table_ptr,
    stride_xb: tl.int64,
    stride_xl: tl.int64,
    stride_xh: tl.int64,
    stride_ob: tl.int64,
    stride_ol: tl.int64,
    stride_oh: tl.int64,
    video,
    height,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One raster token of one sample."""
    program = tl.program_id(0)
    token = program % video
    sample = (program // video).to(tl.int64)
    x_ptr += sample * stride_xb
    out_ptr += sample * stride_ob
    stride_place = stride_ol
    if INVERSE:
        stride_place = stride_xl
        out_ptr += token.to(tl.int64) * stride_ol
    else:
        x_ptr += token.to(tl.int64) * stride_xl
    place = place_of(token, load_steps(table_ptr, 0, PART, HEADS), height, width)
    _move(x_ptr, out_ptr, place, stride_place, stride_xh, stride_oh, 0, PART, HEADS, DIM, PAD, INVERSE)
    if REST > 0:
        place = place_of(token, load_steps(table_ptr, PART, REST, HEADS), height, width)
        _move(x_ptr, out_ptr, place, stride_place, stride_xh, stride_oh, PART, REST, HEADS, DIM, PAD, INVERSE)


def next_power(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def choose_warps(heads: int, head_dim: int, element_size: int) -> int:
    """Warps of a program that copies a token: one for each 2560 bytes, 80 a thread."""
    return min(8, next_power(-(-heads * head_dim * element_size // 2560)))


def reorder(x: torch.Tensor, steps: Steps, inverse: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """The first `steps.video` tokens of x [B, L, H, D] in order, or with `inverse` back in raster order.

    Args:
        x: contiguous along D.
        steps: the order.
        inverse: from the order to raster order.
        out: [B, L', H, D] whose first tokens are written, and nothing else; None makes one, and copies what comes after
            the video.
    """
    batch, _, heads, head_dim = x.shape
    video = steps.video
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out[:, video:] = x[:, video:]
    if batch * heads == 0:
        return out
    part = 1 << (heads.bit_length() - 1)
    pad = next_power(head_dim)
    with gpu.on_device(x):
        reorder_kernel[(batch * video,)](
            x,
            out,
            steps.table,
            *strides_of(x),
            *strides_of(out),
            video,
            steps.height,
            steps.width,
            HEADS=heads,
            DIM=head_dim,
            PAD=pad,
            PART=part,
            REST=next_power(heads - part),
            INVERSE=inverse,
            num_warps=choose_warps(heads, pad, x.element_size()),
        )
    return out
