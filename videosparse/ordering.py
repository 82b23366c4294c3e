"""Token orders: a per-head permutation of the video tokens, and its exact inverse (PAROAttention, arXiv 2506.16054).

An order of the axes is affine: raster token (f, h, w) goes to position f * sf + h * sh + w * sw. So a kernel needs no
list of positions, only a few numbers per head: see `axis_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from videosparse.checking import check_device, check_tensor, shown
from videosparse.layout import TokenLayout, VideoGrid, check_grid, check_is_layout
from videosparse.uploading import upload

AXIS_ORDERS: tuple[str, ...] = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""The six orders of the axes, slowest first; a code of `TokenOrder` is an index into this tuple."""

TABLE_COLUMNS = 8


def axis_table(grid: VideoGrid) -> list[list[int]]:
    """What kernels read of an order: a row of `TABLE_COLUMNS` numbers for each of `AXIS_ORDERS`.

    Columns 0..2 are the steps sf, sh, sw: raster token (f, h, w) goes to position f * sf + h * sh + w * sw.
    The others lead back: position p holds raster token
    p // big * a + p % big // middle * b + p % middle * c, where columns 3..7 are big, middle, a, b, c.
    """
    sizes = {"F": grid.frames, "H": grid.height, "W": grid.width}
    raster = {"F": grid.frame_tokens, "H": grid.width, "W": 1}
    rows = []
    for slow, middle, fast in map(tuple, AXIS_ORDERS):
        steps = {slow: sizes[middle] * sizes[fast], middle: sizes[fast], fast: 1}
        back = [steps[slow], steps[middle], raster[slow], raster[middle], raster[fast]]
        rows.append([steps[axis] for axis in "FHW"] + back)
    return rows


@dataclass(frozen=True)
class TokenOrder:
    """Which axis order each head reads the video tokens in. Text and gap stay where they are.

    Args:
        grid: the token grid that is permuted.
        codes: one index into `AXIS_ORDERS` per head.

    Attributes:
        heads: how many there are.

    Raises:
        TypeError: grid is no VideoGrid, or codes is no tuple of ints.
        ValueError: no codes, or a code outside 0..5.
    """

    grid: VideoGrid
    codes: tuple[int, ...]
    heads: int = field(init=False, repr=False, compare=False)
    _tables: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_grid("TokenOrder.grid", self.grid)
        if not isinstance(self.codes, tuple) or any(type(c) is not int for c in self.codes):
            raise TypeError(
                f"TokenOrder.codes must be a tuple of ints, one per head (got {self.codes!r}); for names such as "
                '"HWF" use TokenOrder.from_names(grid, names).'
            )
        bad = [c for c in self.codes if not 0 <= c < len(AXIS_ORDERS)]
        if bad or not self.codes:
            raise ValueError(
                f"TokenOrder.codes must be indices 0..5 into {AXIS_ORDERS}, one per head (got {self.codes})."
            )
        # kept apart: a compiled block that counts the codes would be compiled again for others
        object.__setattr__(self, "heads", len(self.codes))

    @classmethod
    def from_names(cls, grid: VideoGrid, names: Sequence[str]) -> TokenOrder:
        """Build from names such as ["FHW", "HWF"], one per head: frames, rows (H) and columns (W), slowest first.

        Raises:
            TypeError: grid is no `VideoGrid`, or names is no list or tuple of str.
            ValueError: no names, or one that is not in `AXIS_ORDERS`.
        """
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise TypeError(f'names must be a list such as ["FHW", "HWF"], one per head (got {shown(names)}).')
        unknown = [n for n in names if n not in AXIS_ORDERS]
        if unknown:
            raise ValueError(f"Unknown axis order {unknown[0]!r}; choose from {', '.join(AXIS_ORDERS)}.")
        return cls(grid, tuple(AXIS_ORDERS.index(n) for n in names))

    def table(self, device: torch.device) -> torch.Tensor:
        """int32 [heads, TABLE_COLUMNS] on a device: the rows of `axis_table` of all heads.

        Made once per device, without waiting for it. A compiled block only reads it: ask once before, outside.
        """
        found = self._tables.get(device)
        if found is None:
            rows = axis_table(self.grid)
            found = self._tables[device] = _table([rows[c] for c in self.codes], device)
        return found

    def permutation(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 [heads, video]: position t of the reordered sequence holds raster token permutation[h, t].

        Raises:
            TypeError, ValueError: device is neither a device nor the name of one.
        """
        device = check_device(device)
        raster = torch.arange(self.grid.tokens, device=device).view(self.grid.frames, self.grid.height, self.grid.width)
        axes = {"F": 0, "H": 1, "W": 2}
        orders = [raster.permute([axes[a] for a in name]).flatten() for name in AXIS_ORDERS]
        return torch.stack([orders[c] for c in self.codes])

    def apply(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Reorder the video tokens of x [B, L, heads, D] of any dtype; text and gap stay where they are.

        Returns:
            A new tensor of the same shape and dtype.

        Raises:
            TypeError: x is no tensor, or layout no `TokenLayout`.
            ValueError: x is of another rank, or for other heads; layout is of another grid.
        """
        return self._gather(x, layout, inverse=False)

    def restore(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Undo `apply` bit by bit; arguments, result and errors are as there."""
        return self._gather(x, layout, inverse=True)

    def _gather(self, x: torch.Tensor, layout: TokenLayout, inverse: bool) -> torch.Tensor:
        check_is_layout(layout)
        check_tensor("x", x, " [batch, length, heads, head_dim]")
        if x.dim() != 4:
            raise ValueError(f"x must be [batch, length, heads, head_dim] (got {list(x.shape)}).")
        check_order(self, x.shape[2], layout.grid)
        source = self.permutation(x.device)
        index = (source.argsort(1) if inverse else source).t()[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
        return torch.cat([x[:, : layout.video].gather(1, index), x[:, layout.video :]], 1)


@dataclass(frozen=True, eq=False)
class SearchedOrder:
    """An order that only the device knows, because it was chosen there; in place of a `TokenOrder` in calls.

    Args:
        grid: the token grid that is permuted.
        codes: integers [heads] on the device, indices into `AXIS_ORDERS`; may be written between calls.

    Raises:
        ValueError: codes of another rank, or none.
        TypeError: grid is no VideoGrid, or codes is no tensor of integers.
    """

    grid: VideoGrid
    codes: torch.Tensor
    _rows: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_grid("SearchedOrder.grid", self.grid)
        check_tensor("SearchedOrder.codes", self.codes, " [heads] of indices into AXIS_ORDERS")
        if self.codes.dim() != 1 or not self.codes.shape[0]:
            raise ValueError(f"SearchedOrder.codes must be [heads] (got {list(self.codes.shape)}).")
        if self.codes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"SearchedOrder.codes must be int32 or int64 (got {self.codes.dtype}).")
        object.__setattr__(self, "_rows", _table(axis_table(self.grid), self.codes.device))

    @property
    def heads(self) -> int:
        """Heads that the order is for."""
        return self.codes.shape[0]

    def table(self, device: torch.device) -> torch.Tensor:
        """int32 [heads, TABLE_COLUMNS] as `TokenOrder.table`, looked up where the codes are."""
        return self._rows.index_select(0, self.codes)


AnyOrder = TokenOrder | SearchedOrder


def check_order(order: AnyOrder, heads: int, grid: VideoGrid) -> None:
    """Raise TypeError or ValueError unless an order is one, for this many heads on this grid."""
    check_is_order(order)
    if order.heads != heads or grid != order.grid:
        raise ValueError(
            f"{type(order).__name__} is for {order.heads} heads on grid {order.grid} "
            f"(got {heads} heads on grid {grid}); make an order for this grid, a code per head."
        )


def check_is_order(order: AnyOrder) -> None:
    """Raise TypeError unless an order is one."""
    if not isinstance(order, (TokenOrder, SearchedOrder)):
        raise TypeError(
            f'order must be a TokenOrder or a SearchedOrder (got {shown(order)}); for names such as "HWF", one per '
            "head, pass TokenOrder.from_names(grid, names)."
        )


def _table(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """int32 on the device, without waiting for it."""
    # a plain tensor also when the caller is in inference mode: the next one may be training
    with torch.inference_mode(False):
        return upload(torch.tensor(rows, dtype=torch.int32, device="cpu"), device)
