"""From the mass of every block to a map (`select_blocks`), and from a map to the lists of one call (`expand_blocks`).

The kernels keep the largest blocks of a row and expand bits to lists, in Triton (`triton_select`) or in torch
(`torch_select`). What lies between, which head keeps how many, is small tensor arithmetic, the same for both. Nothing
waits for the device, and nothing depends on the order in which threads run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from videosparse.blocks import BlockIndex, PackedIndex, id_dtype, work_order
from videosparse.checking import check_tensor, shown
from videosparse.kernels import torch_select
from videosparse.kernels.backend import choose_own
from videosparse.kernels.options import check_backend


@dataclass(frozen=True)
class Selection:
    """How many blocks a row keeps: sizes that the host knows, the same for every layer of a run.

    Args:
        video_rows, video_cols: rows and columns of blocks before the text, which is always kept.
        base: video columns that a row keeps, at least 1.
        low, high: the same in heads whose recall at `base` is among the best and the worst, as far below `base` as
            above, so that it is their mean; equal to `base` to treat all heads alike.
        threshold: recall above which a head counts as one that can do with less.
        sample: rows of a block of queries that the search visits; None visits all.
    """

    video_rows: int
    video_cols: int
    base: int
    low: int
    high: int
    threshold: float
    sample: int | None = None

    def capacity(self, shape: tuple[int, int, int, int]) -> int:
        """Most blocks that a map of `shape` = (samples, heads, rows, columns) keeps, whatever the data."""
        samples, heads, rows, columns = shape
        return samples * heads * self._kept(rows, columns)

    def densities(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """(kept / all blocks, the same among video blocks) of a map [..., rows, columns], mean over heads."""
        rows, columns = shape[-2:]
        return self._kept(rows, columns) / (rows * columns), self.base / self.video_cols

    def _kept(self, rows: int, columns: int) -> int:
        """Blocks that a head keeps whose rows keep `base`."""
        text_cols = columns - self.video_cols
        return self.video_rows * (self.base + text_cols) + (rows - self.video_rows) * columns


def columns_of(density: float, columns: int) -> int:
    """How many of its columns a row keeps at a density: its share of them, rounded, at least one."""
    return min(columns, max(1, int(density * columns + 0.5)))


def select(sums: torch.Tensor, index: PackedIndex, selection: Selection, backend: str = "auto") -> None:
    """Write the map that keeps the largest blocks of every row into `index`; see `Selection`.

    Args:
        sums: fp32 [B, H, M, N], mass of every block, not negative; NaN counts as the smallest.
        index: for B samples and H heads, M x N blocks; what it held is overwritten.
        selection: how many blocks to keep.
        backend: "auto", "triton" or "torch"; libraries of attention count as "auto".

    Raises:
        TypeError: an argument of another type.
        ValueError: sums of another shape or dtype, or an unknown backend.
        RuntimeError: backend is "triton", which cannot run here.
    """
    check_tensor("sums", sums, ", as block_sums gives it")
    check_backend(backend)
    _check_packed(index)
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection (got {shown(selection)}).")
    if tuple(sums.shape) != index.shape or sums.dtype != torch.float32:
        raise ValueError(
            f"sums must be float32 {list(index.shape)}, as block_sums gives it for this map (got {sums.dtype} "
            f"{list(sums.shape)})."
        )
    select_blocks(
        sums,
        index.bits,
        index.row_ptr,
        index.order,
        selection.video_rows,
        selection.video_cols,
        selection.base,
        selection.low,
        selection.high,
        selection.threshold,
        backend,
    )


def expand(index: PackedIndex, backend: str = "auto") -> BlockIndex:
    """The lists of a map, for one call.

    Args:
        index: of B samples and H heads.
        backend: as in `select`.

    Raises:
        TypeError: index is no `PackedIndex`.
        ValueError: an unknown backend.
        RuntimeError: backend is "triton", which cannot run here.
    """
    _check_packed(index)
    check_backend(backend)
    row_ptr, order = index.row_ptr, index.order
    ids = expand_blocks(index.bits, row_ptr, index.capacity, index.shape[3], backend)
    if torch.is_grad_enabled():  # a later search writes these in place, and the backward of this call may come after
        row_ptr, order = row_ptr.clone(), order.clone()
    return BlockIndex(row_ptr, ids, order, index.shape, index.block, index.q_len, index.kv_len)


def _check_packed(index: PackedIndex) -> None:
    if not isinstance(index, PackedIndex):
        raise TypeError(f"index must be a PackedIndex (got {shown(index)}); pass PackedIndex.allocate(...).")


@torch.library.custom_op(
    "videosparse::select_blocks",
    mutates_args=("bits", "row_ptr", "order"),
    schema=(
        "(Tensor sums, Tensor(a!) bits, Tensor(b!) row_ptr, Tensor(c!) order, SymInt video_rows, SymInt video_cols, "
        "SymInt base, SymInt low, SymInt high, float threshold, str backend) -> ()"
    ),
)
def select_blocks(
    sums: torch.Tensor,
    bits: torch.Tensor,
    row_ptr: torch.Tensor,
    order: torch.Tensor,
    video_rows: int,
    video_cols: int,
    base: int,
    low: int,
    high: int,
    threshold: float,
    backend: str,
) -> None:
    """See `select`."""
    batch, heads, rows, columns = sums.shape
    kernels = kernels_for(backend, sums)
    sums = sums.contiguous()
    counts = torch.full((batch, heads), base, dtype=torch.int32, device=sums.device)
    kept = kernels.keep_largest(sums, counts, bits, video_rows, video_cols)
    if (low, high) != (base, base):
        recall = head_recall(sums, kept, video_rows)
        counts = head_counts(recall, base, low, high, threshold)
        kernels.keep_largest(sums, counts, bits, video_rows, video_cols)
    write_places(counts, row_ptr, order, (rows, columns), (video_rows, video_cols))


@select_blocks.register_fake
def _select_blocks_fake(
    sums: torch.Tensor,
    bits: torch.Tensor,
    row_ptr: torch.Tensor,
    order: torch.Tensor,
    video_rows: int,
    video_cols: int,
    base: int,
    low: int,
    high: int,
    threshold: float,
    backend: str,
) -> None:
    return None


@torch.library.custom_op(
    "videosparse::expand_blocks",
    mutates_args=(),
    schema="(Tensor bits, Tensor row_ptr, SymInt capacity, SymInt columns, str backend) -> Tensor",
)
def expand_blocks(bits: torch.Tensor, row_ptr: torch.Tensor, capacity: int, columns: int, backend: str) -> torch.Tensor:
    """The lists of a map of bits, ids [capacity]; see `torch_select.expand`."""
    ids: torch.Tensor = kernels_for(backend, bits).expand(bits, row_ptr, capacity, columns)
    return ids


@expand_blocks.register_fake
def _expand_blocks_fake(
    bits: torch.Tensor, row_ptr: torch.Tensor, capacity: int, columns: int, backend: str
) -> torch.Tensor:
    return bits.new_empty((capacity,), dtype=id_dtype(columns))


def write_places(
    counts: torch.Tensor,
    row_ptr: torch.Tensor,
    order: torch.Tensor,
    blocks: tuple[int, int],
    video: tuple[int, int],
) -> None:
    """Write where the lists of every row start, and in which order to start them, from how many blocks rows keep.

    Args:
        counts: int [B, H], video columns that a video row keeps, beside all of text; a text row keeps everything.
        row_ptr, order: int32 [B * H * rows + 1], written; see `BlockIndex`.
        blocks: (rows, columns) of the map.
        video: (rows, columns) of it before the text.
    """
    rows, columns = blocks
    per_row = torch.full((*counts.shape, rows), columns, dtype=torch.int64, device=counts.device)
    per_row[:, :, : video[0]] = counts[..., None].long() + (columns - video[1])
    per_row = per_row.flatten()
    row_ptr[:1] = 0  # one element as a slice is filled, as a number copied, for which the host would wait
    row_ptr[1:] = per_row.cumsum(0)
    order.copy_(work_order(per_row))


def head_recall(sums: torch.Tensor, kept: torch.Tensor, video_rows: int) -> torch.Tensor:
    """Share of the mass of a head's video rows that their kept blocks hold, fp32 [B, H]; 0 where that is no number.

    Args:
        sums: fp32 [B, H, M, N].
        kept: fp32 [B, H, M], mass of each row's kept blocks.
        video_rows: rows before the text, which keep everything and would say nothing.
    """
    total = sums[:, :, :video_rows].sum((2, 3))
    return (kept[:, :, :video_rows].sum(2) / total).nan_to_num(0.0, 0.0, 0.0)


def head_counts(recall: torch.Tensor, base: int, low: int, high: int, threshold: float) -> torch.Tensor:
    """How many video columns the rows of each head keep, int32 [B, H], from its recall at `base`, fp32 [B, H].

    As many heads as have a recall above `threshold`, but at most half of them, keep `low`: those of highest recall. As
    many of lowest recall keep `high`. Of equal ones the lower head comes first, and none gets both.
    """
    heads = recall.shape[1]
    rank = torch.arange(heads, device=recall.device).expand_as(recall)
    chosen = rank < (recall > threshold).sum(1, keepdim=True).clamp(max=heads // 2)
    best = recall.argsort(dim=1, descending=True, stable=True)
    is_low = torch.zeros_like(chosen).scatter_(1, best, chosen)
    worst = recall.masked_fill(is_low, torch.inf).argsort(dim=1, stable=True)
    is_high = torch.zeros_like(chosen).scatter_(1, worst, chosen)
    counts = torch.full_like(recall, base, dtype=torch.int32)
    return counts.masked_fill_(is_low, low).masked_fill_(is_high, high)


def kernels_for(backend: str, x: torch.Tensor) -> Any:
    """The module whose kernels run on the device of `x`."""
    if choose_own(backend, x.device, torch.float32, "selection of blocks") == "torch":
        return torch_select
    from videosparse.kernels import triton_select

    return triton_select
