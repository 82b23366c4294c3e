"""The work of a call as both Hopper kernels of attention take it: its rows, the lists they read, where tokens are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from videosparse.kernels.call import AttentionCall
from videosparse.kernels.hopper_kernel import TAIL_BLOCKS
from videosparse.kernels.value_tail import value_tail
from videosparse.layout import ceil_div


def unsuited(call: AttentionCall, batch: int, length: int, heads: int) -> str | None:
    """What of a call's rows and blocks these kernels do not take; None when they take all."""
    if call.lists is not None and call.lists.block[0] != 128:
        return f"it takes blocks of 128 query rows (got {call.lists.block[0]})"
    if batch >= 2**15 or heads >= 2**16 or batch * heads * ceil_div(length, 128) >= 2**31:
        return "it takes fewer than 2^15 samples, 2^16 heads and 2^31 rows of blocks"
    keys = 128 if call.lists is None else call.lists.block[1]
    if _has_text(call) and ceil_div(length, keys) - call.video // keys > TAIL_BLOCKS.value:
        return f"it takes up to {TAIL_BLOCKS.value} key blocks of text"
    return None


def _has_text(call: AttentionCall) -> bool:
    """Whether some of the positions below the length hold no tokens."""
    return call.seq_lens is not None or call.text_start > call.video


@cache
def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has; every launch asks."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, eq=False)
class Work:
    """What the kernels are told of a call besides its queries, keys and values.

    Args:
        keys: positions of a key block.
        sparse: whether there are lists.
        text: whether some of the positions below the length hold no tokens.
        lists: row_ptr, ids and order as in `call.Lists`; any tensor where there are none.
        lens: int32 [B], where each sample's text ends; any tensor without text.
        counter: int32 [1], 0: rows are drawn from it.
        counts: rows of blocks in all, of one head, heads; rows of blocks of the map, its heads, how often it is read.
        tokens: the length, and where the video ends and text starts; three times the length without text.
    """

    keys: int
    sparse: bool
    text: bool
    lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    lens: torch.Tensor
    counter: torch.Tensor
    counts: tuple[int, int, int, int, int, int]
    tokens: tuple[int, int, int]

    @classmethod
    def of(cls, call: AttentionCall, batch: int, length: int, heads: int, device: torch.device) -> Work:
        """The work of a call that `unsuited` lets pass, on `device`, which is the current one."""
        # The counter is made anew by every call, so that nothing is left behind by an aborted launch, and a captured
        # graph sets it to 0 in every replay.
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        rows = ceil_div(length, 128)
        total = batch * heads * rows
        lists = call.lists
        if lists is None:
            keys, tensors, map_rows, map_heads = 128, (counter, counter, counter), total, heads
        else:
            keys, tensors = lists.block[1], (lists.row_ptr, lists.ids, lists.order)
            map_rows, map_heads = lists.samples * lists.heads * rows, lists.heads
        counts = total, rows, heads, map_rows, map_heads, total // map_rows
        text = _has_text(call)
        if not text:
            return cls(keys, lists is not None, text, tensors, counter, counter, counts, (length, length, length))
        lens = call.seq_lens
        lens = torch.full((batch,), length, dtype=torch.int32, device=device) if lens is None else lens.contiguous()
        tokens = length, call.video, call.text_start
        return cls(keys, lists is not None, text, tensors, lens, counter, counts, tokens)

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """Of a launch, in the order in which both kernels name them."""
        return (*self.lists, self.lens, self.counter, *self.counts, *self.tokens)

    @property
    def ids(self) -> torch.Tensor:
        """Numbers of blocks, in one of two widths."""
        return self.lists[1]

    @property
    def programs(self) -> int:
        """How many to start: one for each multiprocessor, but not more than there are rows."""
        return min(multiprocessors(self.counter.device), self.counts[0])

    def tail(self, v: torch.Tensor) -> torch.Tensor:
        """Of values [B, L, H, D] those behind the last whole block of video, 0 where no token is: see `value_tail`."""
        _, video, text_start = self.tokens
        return value_tail(v, self.lens, video // self.keys * self.keys, video, text_start)
