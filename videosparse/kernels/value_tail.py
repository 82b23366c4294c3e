# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A clean copy of the values behind the last whole block of video: 0 wherever no token is.

A kernel that copies whole blocks cannot leave out single values, and 0 * NaN is NaN. Only the blocks that hold the end
of the video, the gap, text and padding need this, a few hundred positions whatever the length of the video.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from videosparse.layout import ceil_div

_ROWS = 32  # tokens of one head that a program copies


@triton.jit(do_not_specialize=["lens_ptr", "first", "size", "video", "text_start", "heads"])
def tail_kernel(
    v_ptr,
    tail_ptr,
    lens_ptr,
    stride_b: tl.int64,
    stride_l: tl.int64,
    stride_h: tl.int64,
    first,
    size,
    video,
    text_start,
    heads,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Positions [first, first + size) of v [B, L, H, D] to tail [B, size, H, D]; HEAD_DIM is a power of two."""
    chunk = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    end = tl.load(lens_ptr + sample)
    row = chunk * ROWS + tl.arange(0, ROWS)
    position = first + row
    token = (position < video) | ((position >= text_start) & (position < end))
    dims = tl.arange(0, HEAD_DIM)
    source = v_ptr + sample * stride_b + head * stride_h + position.to(tl.int64)[:, None] * stride_l + dims[None, :]
    inside = row < size
    values = tl.load(source, mask=(token & inside)[:, None], other=0.0)
    target = ((sample * size + row) * heads + head) * HEAD_DIM
    tl.store(tail_ptr + target[:, None] + dims[None, :], values, mask=inside[:, None])


def value_tail(v: torch.Tensor, lens: torch.Tensor, first: int, video: int, text_start: int) -> torch.Tensor:
    """The values from position `first` on, with 0 where no token is, whatever memory holds there.

    Args:
        v: [B, L, H, D] on the current device, any strides, contiguous along D, a power of two.
        lens: int32 [B], the position where each sample's text ends.
        first: first position to copy.
        video, text_start: positions [0, video) and [text_start, lens[b]) hold tokens.

    Returns:
        [B, L - first, H, D], contiguous.
    """
    batch, length, heads, head_dim = v.shape
    size = length - first
    tail = torch.empty((batch, size, heads, head_dim), dtype=v.dtype, device=v.device)
    tail_kernel[(ceil_div(size, _ROWS), heads, batch)](
        v, tail, lens, *v.stride()[:3], first, size, video, text_start, heads, HEAD_DIM=head_dim, ROWS=_ROWS
    )
    return tail
