"""Attention by PyTorch's FlexAttention, taken when asked for by backend="flex".

The block mask is made from our lists directly: `create_block_mask` evaluates its rule for every pair of tokens, which
takes seconds and gigabytes at the length of a video. FlexAttention compiles on first use, and again for every new
length, head count or block: its kernels for shapes that vary were once seen to give a wrong result, and are not used.

Shapes: q, k, v [B, L, H, D], as everywhere; FlexAttention sees them as [B, H, L, D]. lse fp32 [B, H, L], natural log.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.padded import PaddedLists, padded
from videosparse.layout import ceil_div

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_GRAPHS = 256
MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def missing(device: torch.device) -> str | None:
    """What keeps FlexAttention from running on a device; None when nothing does."""
    return None if device.type == "cuda" else f"compiled FlexAttention needs a GPU (got {device.type})"


def unsuited(q: torch.Tensor, call: AttentionCall) -> str | None:
    """Why FlexAttention cannot take a call on q [B, L, H, D]; None when it can."""
    if q.dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32 (got {q.dtype})"
    if q.shape[3] < 16 or q.shape[3] & (q.shape[3] - 1):
        return f"head_dim must be a power of two, 16 or more (got {q.shape[3]})"
    if call.lists is None and (call.seq_lens is not None or call.text_start != call.video):
        return "dense calls with text padding need a block map"
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one call.

    With text, v is copied to clear what lies in the gap and in padding: a weight of 0 times NaN would be NaN.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.

    Raises:
        RuntimeError: it cannot take this call; the message says why.
    """
    reason = unsuited(q, call)
    if reason is not None:
        raise RuntimeError(f'backend="flex" cannot run this call: {reason}. Use backend="auto".')
    invalid = _invalid(q, call)
    if invalid is not None:
        v = v.masked_fill(invalid[:, :, None, None], 0)
    mask = None if call.lists is None else block_mask(call, q.shape[0], q.shape[1])
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    # past the usual limit of 8 recompiles a full graph raises
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
        found = _compiled()(
            *heads_first, block_mask=mask, scale=call.scale, return_lse=need_lse, kernel_options=_tiles(call)
        )
    out, lse = found if need_lse else (found, torch.empty(0, dtype=torch.float32, device=q.device))
    out = out.transpose(1, 2).contiguous()
    if invalid is not None:
        out.masked_fill_(invalid[:, :, None, None], 0)
        if need_lse:
            lse = lse.masked_fill(invalid[:, None, :], -torch.inf)
    return out, lse


@cache
def _compiled() -> Any:
    # fullgraph: past the limit of recompiles this raises, instead of holding the whole score matrix in eager mode
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _tiles(call: AttentionCall) -> dict[str, int] | None:
    """FlexAttention's tile of keys where its own choice may not divide our block."""
    return None if call.lists is None or call.lists.block[1] >= 128 else {"BLOCK_N": call.lists.block[1]}


@dataclass(frozen=True, eq=False)
class _Known:
    """A mask made before, for lists that have not changed since.

    Args:
        key: what it was made from.
        mask: the mask; the same object every time, since FlexAttention compiles again for another rule.
        ends: int32 [B], where the rule reads the end of each sample's text.
    """

    key: tuple[object, ...]
    mask: BlockMask
    ends: torch.Tensor


_known: MutableMapping[torch.Tensor, _Known] = WeakIdKeyDictionary()


def block_mask(call: AttentionCall, batch: int, length: int, *, backward: bool = False) -> BlockMask:
    """The lists of a call as FlexAttention's mask, made once for lists that have not changed since.

    Args:
        call: with lists.
        batch: B.
        length: L.
        backward: also make the key-major tables that gradients need.
    """
    assert call.lists is not None
    ids = call.lists.ids
    tables = padded(call.lists, ceil_div(length, call.lists.block[1]))
    key = (tables, batch, length, call.video, call.text_start, call.seq_lens is None, backward)
    known = _known.get(ids)
    if known is None or known.key != key:
        ends = torch.full((batch,), length, dtype=torch.int32, device=ids.device)
        known = _Known(key, _make(call, tables, length, ends, backward), ends)
        _known[ids] = known
    if call.seq_lens is not None:
        known.ends.copy_(call.seq_lens)
    return known.mask


def _make(call: AttentionCall, tables: PaddedLists, length: int, ends: torch.Tensor, backward: bool) -> BlockMask:
    lists = call.lists
    assert lists is not None
    options: dict[str, Any] = {"seq_lengths": (length, length), "compute_q_blocks": backward}
    if call.seq_lens is None and call.text_start == call.video:
        return BlockMask.from_kv_blocks(
            tables.empty, tables.ids, tables.counts, tables.ids, BLOCK_SIZE=lists.block, **options
        )
    whole, part, part_ids = _split(tables, call.video // lists.block[1])
    rule = _rule(call.video, call.text_start, ends)
    return BlockMask.from_kv_blocks(part, part_ids, whole, tables.ids, BLOCK_SIZE=lists.block, mask_mod=rule, **options)


def _split(tables: PaddedLists, wholly_video: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(count of leading blocks that hold video only, count of the others, ids of the others) of each row.

    Which text is valid differs by sample, so that all blocks from number `wholly_video` on are masked by the rule.
    """
    columns = tables.ids.shape[-1]
    place = torch.arange(columns, device=tables.ids.device)
    listed = place < tables.counts[..., None]
    whole = (listed & (tables.ids < wholly_video)).sum(-1, dtype=torch.int32)
    part = tables.counts - whole
    moved = (place + whole[..., None]).clamp_(max=columns - 1)
    return whole, part, tables.ids.gather(-1, moved)


def _rule(video: int, text_start: int, ends: torch.Tensor) -> MaskRule:
    """Whether a key position holds a valid token of its sample."""

    def valid(sample: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key < video) | ((key >= text_start) & (key < ends[sample]))

    return valid


def _invalid(q: torch.Tensor, call: AttentionCall) -> torch.Tensor | None:
    """Bool [B, L]: True where no valid token is; None when all are."""
    if call.seq_lens is None and call.text_start == call.video:
        return None
    position = torch.arange(q.shape[1], device=q.device)
    outside = (position >= call.video) & (position < call.text_start)
    if call.seq_lens is None:
        return outside.expand(q.shape[0], -1)
    return outside | ((position >= call.video) & (position >= call.seq_lens[:, None]))
