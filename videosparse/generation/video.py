"""Videos as `videosparse generate` writes them: one (`videosparse.mp4`), or two side by side."""

from __future__ import annotations

import torch

from videosparse.mp4 import Mp4Writer, read_mp4, to_uint8, write_mp4

__all__ = ["DIVIDER", "Mp4Writer", "read_mp4", "side_by_side", "to_uint8", "write_mp4"]

DIVIDER = 8
"""Pixels of white between the two halves of a side-by-side video."""


def side_by_side(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two videos [frames, 3, height, width] in [0, 1] in one, with a white line between them.

    Raises:
        ValueError: their shapes differ.
    """
    if left.shape != right.shape:
        raise ValueError(
            f"Both videos must have one shape (got {list(left.shape)} and {list(right.shape)}); generate both with the "
            "same num_frames, height and width."
        )
    line = left.new_ones(*left.shape[:3], DIVIDER)
    return torch.cat((left, line, right.to(left)), dim=3)
