"""What `norm_rotate` norms: the queries and keys of one kind of token, with their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Stream:
    """Projections of the video tokens, or of the text tokens, and the RMS norms that they go through.

    Args:
        q, k: [B, S, H * D], contiguous along the last dimension.
        q_weight, k_weight: [H * D] for one norm across all heads, [D] for one of every head by itself.
        eps: added to the mean of squares, above 0.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float
