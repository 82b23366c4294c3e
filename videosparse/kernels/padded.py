"""Block lists as the padded tables that other attention libraries read, kept as long as the lists themselves.

FlexAttention and FlashAttention-4 take, for each block row, a count and a row of a rectangular table. Such a table has
an entry for every block of the map, kept or not: it is what our ragged lists avoid, and only made for those libraries.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from videosparse.kernels.call import Lists

# Tables are filled from slabs of this many entries, so that temporaries stay near 100 MB whatever the length.
_SLAB = 2**22


@dataclass(frozen=True, eq=False)
class PaddedLists:
    """Rectangular form of `Lists`.

    Args:
        counts: int32 [samples, heads, rows], kept blocks of each row.
        ids: int32 [samples, heads, rows, columns], ascending; 0 beyond a row's count.
        empty: int32 [samples, heads, rows], zeros: for the kind of blocks that there are none of.
    """

    counts: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor

    @property
    def bytes(self) -> int:
        """Memory of the tables on their device."""
        return sum(t.numel() * t.element_size() for t in (self.counts, self.ids, self.empty))


def pad(lists: Lists, columns: int) -> PaddedLists:
    """Make the tables of `lists` over `columns` key blocks, on their device, without waiting for it."""
    rows = lists.row_ptr.shape[0] - 1
    shape = (lists.samples, lists.heads, rows // (lists.samples * lists.heads))
    starts, counts = lists.row_ptr[:-1], lists.row_ptr.diff()
    ids = torch.zeros(rows, columns, dtype=torch.int32, device=lists.ids.device)
    column = torch.arange(columns, dtype=torch.int32, device=lists.ids.device)
    slab = max(1, _SLAB // columns)
    if lists.ids.numel():
        for first in range(0, rows, slab):
            part = slice(first, first + slab)
            # beyond a row's count the place may lie outside the lists: any place does, the entry is dropped
            place = (starts[part, None].long() + column).clamp_(max=lists.ids.numel() - 1)
            ids[part] = lists.ids[place].where(column < counts[part, None], 0)
    return PaddedLists(counts.view(shape), ids.view(*shape, columns), torch.zeros_like(counts).view(shape))


# by the list of ids itself: the tables of a map live as long as its lists
_known: MutableMapping[torch.Tensor, tuple[object, PaddedLists]] = WeakIdKeyDictionary()


def padded(lists: Lists, columns: int) -> PaddedLists:
    """`pad(lists, columns)`, made once for lists that have not changed since."""
    if lists.ids.is_inference():  # such tensors do not say when they change
        return pad(lists, columns)
    version = (lists.ids._version, lists.row_ptr._version, lists.row_ptr.data_ptr(), columns)
    known = _known.get(lists.ids)
    if known is None or known[0] != version:
        known = (version, pad(lists, columns))
        _known[lists.ids] = known
    return known[1]
