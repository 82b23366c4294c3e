"""Token orders: a per-head permutation of the video tokens, and its exact inverse (PAROAttention, arXiv 2506.16054)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from videosparse.layout import TokenLayout, VideoGrid

AXIS_ORDERS: tuple[str, ...] = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""The six orders of the axes, slowest first; a code of `TokenOrder` is an index into this tuple."""


@dataclass(frozen=True)
class TokenOrder:
    """Which axis order each head reads the video tokens in. Text and gap stay where they are.

    Args:
        grid: the token grid that is permuted.
        codes: one index into `AXIS_ORDERS` per head.

    Raises:
        ValueError: no codes, or a code outside 0..5.
    """

    grid: VideoGrid
    codes: tuple[int, ...]

    def __post_init__(self) -> None:
        bad = [c for c in self.codes if not 0 <= c < len(AXIS_ORDERS)]
        if bad or not self.codes:
            raise ValueError(
                f"TokenOrder.codes must be indices 0..5 into {AXIS_ORDERS}, one per head (got {self.codes})."
            )

    @classmethod
    def from_names(cls, grid: VideoGrid, names: Sequence[str]) -> TokenOrder:
        """Build from names such as ["FHW", "HWF"], one per head."""
        unknown = [n for n in names if n not in AXIS_ORDERS]
        if unknown:
            raise ValueError(f"Unknown axis order {unknown[0]!r}; choose from {', '.join(AXIS_ORDERS)}.")
        return cls(grid, tuple(AXIS_ORDERS.index(n) for n in names))

    def permutation(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 [heads, video]: position t of the reordered sequence holds raster token permutation[h, t]."""
        raster = torch.arange(self.grid.tokens, device=device).view(self.grid.frames, self.grid.height, self.grid.width)
        axes = {"F": 0, "H": 1, "W": 2}
        orders = [raster.permute([axes[a] for a in name]).flatten() for name in AXIS_ORDERS]
        return torch.stack([orders[c] for c in self.codes])

    def apply(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Reorder the video tokens of x [B, L, heads, D]; returns a new tensor of the same shape and dtype."""
        return self._gather(x, layout, self.permutation(x.device))

    def restore(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Undo `apply` bit by bit."""
        return self._gather(x, layout, self.permutation(x.device).argsort(1))

    def _gather(self, x: torch.Tensor, layout: TokenLayout, source: torch.Tensor) -> torch.Tensor:
        if x.shape[2] != len(self.codes) or layout.grid != self.grid:
            raise ValueError(
                f"TokenOrder is for {len(self.codes)} heads on grid {self.grid} "
                f"(got {x.shape[2]} heads on grid {layout.grid}); make an order for this grid, a code per head."
            )
        index = source.t()[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
        return torch.cat([x[:, : layout.video].gather(1, index), x[:, layout.video :]], 1)
