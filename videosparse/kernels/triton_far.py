# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What `FarLogits` does to a tile of scores, in Triton: a part of the portable kernels. Imported on first use only.

Shapes
    table         int32 [H, 8], see `ordering.axis_table`; read with a token order only
`window`, `first` and `seen` are those of `logits.Reach`, in raster tokens.

In raster order a tile is near, far or neither: near tiles are left alone, far ones take one product and one minimum,
and only tiles on the border compare tokens. In another order every tile does, since its tokens are from everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from videosparse.logits import Reach

REACH = ["far_window", "far_first", "far_seen"]
"""Sizes of a reach as kernels name them, none of which is to be specialised."""

NO_REACH = Reach(1.0, 0, 0, 0)
"""What kernels get that do not read it."""


@triton.jit
def raster(table_ptr, head, position, video):
    """The raster tokens that positions of a head hold; those past the video hold themselves."""
    row = table_ptr + head * 8
    big = tl.load(row + 3)
    middle = tl.load(row + 4)
    token = position // big * tl.load(row + 5)
    token += position % big // middle * tl.load(row + 6) + position % middle * tl.load(row + 7)
    return tl.where(position < video, token, position)


@triton.jit
def _compare(scores, q_token, k_token, video, alpha, window, first, seen):
    """Scores [M, N] of queries and keys that hold these tokens, token by token."""
    low = tl.where(q_token < video, q_token - window, -1)[:, None]
    high = tl.where(q_token < video, q_token + window, video)[:, None]
    key = k_token[None, :]
    far = ((key < low) | (key > high)) & (key < video)
    hidden = (q_token < first)[:, None] & ((key >= seen) & (key < video))
    return tl.where(hidden, -float("inf"), tl.where(far, tl.minimum(scores, scores * alpha), scores))


@triton.jit
def change(
    scores,
    q_token,
    q_first,
    q_last,
    start,
    table_ptr,
    head,
    video,
    alpha,
    window,
    first,
    seen,
    TILE_N: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Scores [M, TILE_N] as they are to be, in whatever base.

    Args:
        q_token: raster token of each row; at `video` or beyond, it is text.
        q_first, q_last: bounds of the positions of these rows.
        start: position of the first key.
    """
    k_pos = start + tl.arange(0, TILE_N)
    if ORDER:
        return _compare(scores, q_token, raster(table_ptr, head, k_pos, video), video, alpha, window, first, seen)
    last = start + TILE_N - 1
    hides = (q_first < first) & (last >= seen)
    if ((last - q_first > window) | (q_last - start > window) | hides) & (start < video) & (q_first < video):
        if ((start - q_last > window) | (q_first - last > window)) & (not hides) & (last < video) & (q_last < video):
            # a smaller positive number, or the same negative one
            scores = tl.minimum(scores, scores * alpha)
        else:
            scores = _compare(scores, q_token, k_pos, video, alpha, window, first, seen)
    return scores
