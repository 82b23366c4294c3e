"""`norm_rotate` in plain torch: what the kernel is compared with, and what runs where Triton does not."""

from __future__ import annotations

import torch

from videosparse.kernels import torch_order
from videosparse.kernels.call import wide
from videosparse.kernels.steps import Steps
from videosparse.kernels.stream import Pair, Stream


def forward(
    video: Stream, text: Stream | None, rotary: Pair | None, heads: int, text_start: int, order: Steps | None = None
) -> Pair:
    """q and k [B, L, H, D], contiguous, normed and rotated: video in its order, zeros up to `text_start`, then text.

    Computed in float32, or in float64 for float64 projections, and rounded once.
    """
    q, k = _normed(video, heads)
    if rotary is not None:
        q, k = _rotated(q, *rotary), _rotated(k, *rotary)
    q, k = q.to(video.q.dtype), k.to(video.q.dtype)
    if order is not None:
        q, k = torch_order.reorder(q, order, inverse=False), torch_order.reorder(k, order, inverse=False)
    if text is None:
        return q.contiguous(), k.contiguous()
    ends = _normed(text, heads)
    return _join(q, ends[0], text_start), _join(k, ends[1], text_start)


def _normed(stream: Stream, heads: int) -> Pair:
    """q and k [B, S, H, D] in the precision of the computation."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype = wide(x.dtype)
        rows = x.to(dtype).reshape(*x.shape[:2], -1, weight.shape[0])
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + stream.eps) * weight.to(dtype)
        return rows.reshape(*x.shape[:2], heads, -1)

    return norm(stream.q, stream.q_weight), norm(stream.k, stream.k_weight)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)


def _join(video: torch.Tensor, text: torch.Tensor, text_start: int) -> torch.Tensor:
    batch, tokens, heads, head_dim = video.shape
    out = video.new_zeros(batch, text_start + text.shape[1], heads, head_dim)
    out[:, :tokens] = video
    out[:, text_start:] = text
    return out
