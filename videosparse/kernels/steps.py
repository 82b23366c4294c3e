"""What kernels know of a token order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from videosparse.layout import VideoGrid
from videosparse.ordering import AnyOrder, check_order


@dataclass(frozen=True, eq=False)
class Steps:
    """How heads step through the grid.

    Args:
        table: int32 [H, 8], see `ordering.axis_table`.
        video, height, width: tokens of the grid, and its rows and columns.
    """

    table: torch.Tensor
    video: int
    height: int
    width: int


def steps_of(order: AnyOrder, heads: int, grid: VideoGrid, device: torch.device) -> Steps:
    """An order as kernels read it.

    Raises:
        TypeError: it is no order.
        ValueError: it is for other heads or another grid, or lies on another device.
    """
    check_order(order, heads, grid)
    table = order.table(device)
    if table.device != device:
        raise ValueError(f"The order's codes must be on {device} like the tensors (got {table.device}); move them.")
    return Steps(table, grid.tokens, grid.height, grid.width)
