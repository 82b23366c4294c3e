"""Attention by FlashAttention-4 (`pip install -e ".[fa4]"`), taken when asked for by backend="fa4".

Its block-sparse kernel for Hopper reads padded tables of 128-row query blocks and 128- or 64-wide key blocks, and masks
the end of the sequence in the last block of a row, which is where our ascending lists have it. It masks nothing else
without a compiled mask of its own, so sequences with a gap or with text padding are refused.

Shapes: q, k, v [B, L, H, D], as everywhere; lse fp32 [B, H, L], natural log.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.libraries import import_library
from videosparse.kernels.padded import padded
from videosparse.layout import ceil_div
from videosparse.wording import install_extra

DTYPES = (torch.float16, torch.bfloat16)
BLOCKS = ((128, 128), (128, 64))


@cache
def missing(device: torch.device) -> str | None:
    """What keeps FlashAttention-4 from running on a device; None when nothing does."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU (got {device.type})"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "it needs compute capability 9.0 or newer (got {}.{})".format(*torch.cuda.get_device_capability(device))
    reason = import_library("flash_attn.cute")[1]
    return None if reason is None else f"flash-attn-4 is not usable ({install_extra('fa4')}): {reason}"


def unsuited(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Why FlashAttention-4 cannot take a call on q [B, L, H, D]; None when it can."""
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16 (got {q.dtype})"
    if q.shape[3] % 8:
        return f"head_dim must be a multiple of 8 (got {q.shape[3]})"
    if call.seq_lens is not None or call.text_start != call.video:
        return "it cannot mask text padding, nor the gap before text"
    if call.lists is None:
        return None
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return "its block-sparse kernel takes blocks of 128 query rows on Hopper only"
    if call.lists.block not in BLOCKS:
        return f"blocks must be (128, 128) or (128, 64) (got {call.lists.block})"
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one call.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        RuntimeError: it cannot take this call; the message says why.
    """
    reason = unsuited(q, call)
    if reason is not None:
        raise RuntimeError(f'backend="fa4" cannot run this call: {reason}. Use backend="auto".')
    lists = None if call.lists is None else block_sparse(call, k.shape[1])
    attend = import_library("flash_attn.cute")[0].flash_attn_func
    with torch.no_grad():
        out, lse = attend(q, k, v, softmax_scale=call.scale, block_sparse_tensors=lists, return_lse=need_lse)
    return out, lse if need_lse else torch.empty(0, dtype=torch.float32, device=q.device)


def block_sparse(call: AttentionCall, length: int) -> Any:
    """The lists of a call over `length` keys as FlashAttention-4's tensors: every kept block is a full one."""
    assert call.lists is not None
    tables = padded(call.lists, ceil_div(length, call.lists.block[1]))
    make = import_library("flash_attn.cute.block_sparsity")[0].BlockSparseTensorsTorch
    return make(
        mask_block_cnt=tables.empty,
        mask_block_idx=tables.ids[..., :1],
        full_block_cnt=tables.counts,
        full_block_idx=tables.ids,
        block_size=call.lists.block,
    )
