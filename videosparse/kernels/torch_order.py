"""Token orders in plain torch: what the kernels are compared with, and what runs where Triton does not."""

from __future__ import annotations

import torch

from videosparse.kernels.steps import Steps


def places(steps: Steps) -> torch.Tensor:
    """int64 [heads, video]: where each raster token goes."""
    token = torch.arange(steps.video, device=steps.table.device)
    frame, row, column = token // (steps.height * steps.width), token // steps.width % steps.height, token % steps.width
    sf, sh, sw = (steps.table[:, i : i + 1].long() for i in range(3))
    return frame * sf + row * sh + column * sw


def raster_tokens(table: torch.Tensor, video: int, length: int) -> torch.Tensor:
    """int64 [heads, length]: the raster token that each position holds; positions past the video hold themselves.

    Args:
        table: int32 [heads, 8], see `ordering.axis_table`.
        video, length: video tokens, and all positions.
    """
    position = torch.arange(length, device=table.device)
    big, middle, slow, between, fast = (table[:, i : i + 1].long() for i in range(3, 8))
    token = position // big * slow + position % big // middle * between + position % middle * fast
    return torch.where(position < video, token, position)


def reorder(x: torch.Tensor, steps: Steps, inverse: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """The first `steps.video` tokens of x [B, L, H, D] in order, or with `inverse` back in raster order.

    Args:
        x: any dtype and strides.
        steps: the order.
        inverse: from the order to raster order.
        out: [B, L', H, D] whose first tokens are written, and nothing else; None makes one, and copies what comes after
            the video.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out[:, steps.video :] = x[:, steps.video :]
    index = places(steps).t()[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
    video = x[:, : steps.video]
    if inverse:
        out[:, : steps.video] = video.gather(1, index)
    else:
        out[:, : steps.video].scatter_(1, index, video)
    return out


def raster_lse(lse: torch.Tensor, steps: Steps) -> torch.Tensor:
    """lse [B, H, L] of tokens in order, in raster order."""
    index = places(steps)[None].expand(lse.shape[0], -1, -1)
    return torch.cat([lse[:, :, : steps.video].gather(2, index), lse[:, :, steps.video :]], 2)
