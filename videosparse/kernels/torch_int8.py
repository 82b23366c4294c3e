"""Integer attention in plain torch: quantizes as `quantize` does and multiplies the rounded numbers, on any device.

Weights stay fp32 where kernels round them for the product with values, and the mean of keys is always that of all, so
outputs are of the same kind, not the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from videosparse.kernels import torch_path
from videosparse.kernels.call import AttentionCall
from videosparse.layout import ceil_div

SCALED_KEYS = 64
_SMALLEST = 1e-12
_FP8_MAX = 448.0


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, values: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of checked tensors [B, L, H, D].

    Returns:
        out [B, L, H, D] in the dtype of q and lse fp32 [B, H, L], which is empty unless `need_lse`.
    """
    token = is_token(q, call)[:, :, None, None]
    queries, keys = (x.float().masked_fill(~token, 0.0) for x in (q, k))
    mean = keys.sum(1, keepdim=True) / token.sum(1, keepdim=True)
    centred = (keys - mean).masked_fill(~token, 0.0)
    plain = v.float().masked_fill(~token, 0.0)
    by_kind: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
        None: lambda x: x, "fp8": _rounded_to_fp8, "int8": partial(_rounded_by_block, dims=(2,)),
    }  # fmt: skip
    rounded = (
        _rounded_to_int8(queries * call.scale, (3,)),
        _rounded_by_block(centred, dims=(2, 4)),
        by_kind[values](plain),
    )
    out, lse = torch_path.forward(*rounded, dataclasses.replace(call, scale=1.0), need_lse)
    if need_lse:
        lse = lse + (queries * mean).sum(3).transpose(1, 2) * call.scale
    return out.to(q.dtype), lse


def is_token(q: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Bool [B, L]: True at tokens."""
    position = torch.arange(q.shape[1], device=q.device)
    token = (position < call.video) | (position >= call.text_start)
    if call.seq_lens is None:
        return token.expand(q.shape[0], -1)
    return token & ((position < call.video) | (position < call.seq_lens[:, None]))


def _rounded_to_int8(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """x rounded to multiples of a scale, of which the largest |x| along `dims` is 127."""
    peak = x.abs().amax(dims, keepdim=True)
    scale = torch.where(peak < _SMALLEST, 1.0, peak / 127.0)
    return (x / scale).round() * scale


def _rounded_by_block(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """x [B, L, H, D] rounded by a scale for each 64 tokens of a sample and head: of keys one, of values one a channel.

    Args:
        x: what is rounded.
        dims: that a scale is for, of [B, blocks, 64, H, D].
    """
    length = x.shape[1]
    blocks = ceil_div(length, SCALED_KEYS)
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * SCALED_KEYS - length))
    x = x.view(x.shape[0], blocks, SCALED_KEYS, *x.shape[2:])
    return _rounded_to_int8(x, dims).flatten(1, 2)[:, :length]


def _rounded_to_fp8(v: torch.Tensor) -> torch.Tensor:
    """Values [B, L, H, D] rounded to FP8 e4m3 by a scale for each channel."""
    scale = v.abs().amax(1, keepdim=True) / _FP8_MAX
    scale = torch.where(scale == 0.0, 1.0, scale)
    return (v / scale).to(torch.float8_e4m3fn).float() * scale
