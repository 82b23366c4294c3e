"""How far attention may be from the truth: at most twice as far as plain torch in the same precision.

The criterion is FlashAttention's. Nothing else decides whether a kernel is right, in tests and before a timing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from videosparse.blocks import BlockMap
from videosparse.layout import TokenLayout


@dataclass(frozen=True)
class Accuracy:
    """Largest errors against fp64, and the largest allowed ones.

    Args:
        error, allowed: of the output, absolute.
        lse_error, lse_allowed: of the log-sum-exp, absolute; 0 when it was not checked.
        empty_rows: whether exactly the rows without keys are 0 (and -inf in lse).
    """

    error: float
    allowed: float
    lse_error: float
    lse_allowed: float
    empty_rows: bool

    @property
    def ok(self) -> bool:
        """Whether everything is within bounds; NaN is not."""
        return self.error <= self.allowed and self.lse_error <= self.lse_allowed and self.empty_rows


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    *,
    layout: TokenLayout,
    block_map: BlockMap | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` for chosen query rows, so that long sequences can be checked too.

    Args:
        q, k, v: [B, L, H, D]; their dtype is the precision.
        rows: int64 [R], query positions.
        layout, block_map, scale: as in `attention_reference`.

    Returns:
        out [B, R, H, D] and lse [B, H, R] (float64 for float64 inputs, else float32).
    """
    valid = layout.key_mask(q.shape[0], q.device)
    allowed = valid[:, None, rows, None] & valid[:, None, None, :]
    if block_map is not None:
        keep = block_map.keep.to(q.device)[:, :, rows // block_map.block[0]]
        allowed = allowed & keep.repeat_interleave(block_map.block[1], 3)[..., : q.shape[1]]
    scores = torch.einsum("blhd,bmhd->bhlm", q[:, rows], k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    values = v.masked_fill(~valid[:, :, None, None], 0)
    return torch.einsum("bhlm,bmhd->blhd", p.to(v.dtype), values), lse


def measure(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    block_map: BlockMap | None = None,
    scale: float | None = None,
    rows: torch.Tensor | None = None,
) -> Accuracy:
    """Judge an output of `attend`.

    Args:
        out, lse: what is judged, [B, L, H, D] and [B, H, L] or None.
        q, k, v, layout, block_map, scale: what it was made from.
        rows: int64 [R], query positions to look at; None looks at all. Memory grows with B x H x R x L.
    """
    rows = torch.arange(layout.length, device=q.device) if rows is None else rows
    true_out, true_lse = attend_rows(
        q.double(), k.double(), v.double(), rows, layout=layout, block_map=block_map, scale=scale
    )
    plain_out, plain_lse = attend_rows(q, k, v, rows, layout=layout, block_map=block_map, scale=scale)
    empty = true_lse == -torch.inf
    found_out = out[:, rows]
    right = bool((found_out.transpose(1, 2)[empty] == 0).all())
    lse_error = lse_allowed = 0.0
    if lse is not None:
        found = lse[:, :, rows]
        right = right and torch.equal(found == -torch.inf, empty)
        lse_error = _largest((found - true_lse)[~empty])
        lse_allowed = _allowed(true_lse[~empty], plain_lse[~empty])
    error = _largest((found_out - true_out)[~empty.transpose(1, 2)])
    allowed = _allowed(true_out[~empty.transpose(1, 2)], plain_out[~empty.transpose(1, 2)])
    return Accuracy(error, allowed, lse_error, lse_allowed, right)


def _largest(x: torch.Tensor) -> float:
    """Largest magnitude; NaN if there is one, 0 for no elements."""
    return float(x.abs().max()) if x.numel() else 0.0


def _allowed(truth: torch.Tensor, plain: torch.Tensor) -> float:
    """Twice the error of `plain`, which counts as no better than the truth rounded to its dtype."""
    return 2 * max(_largest(plain - truth), _largest(truth.to(plain.dtype) - truth))
