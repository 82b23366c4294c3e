"""The oracle: attention in plain torch, in the precision of its inputs. Every kernel is judged against it."""

from __future__ import annotations

import torch

from videosparse.blocks import BlockMap
from videosparse.layout import TokenLayout
from videosparse.logits import FarLogits


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout | None = None,
    block_map: BlockMap | None = None,
    scale: float | None = None,
    logit: FarLogits | None = None,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with optional block sparsity and text lengths, holding the whole score matrix.

    Args:
        q, k, v: [B, L, H, D], any float dtype; pass float64 for the truth.
        layout: which positions hold tokens; None when all do.
        block_map: which blocks are read; None reads all.
        scale: factor of the scores; default D ** -0.5.
        logit: what is done to the scores; needs a layout.
        tokens: int64 [H or 1, L], the raster token that each position holds, for `logit` where q, k and v come in
            another order; None is raster order.

    Returns:
        out [B, L, H, D] in the dtype of q, and lse [B, H, L] (natural log; float64 for float64 inputs, else float32).
        A row that reads no key, and a row that is no valid token, gives 0 and -inf.
    """
    batch, rows = q.shape[:2]
    allowed = torch.ones(batch, 1, rows, k.shape[1], dtype=torch.bool, device=q.device)
    if layout is not None:
        valid = layout.key_mask(batch, q.device)
        allowed = allowed & valid[:, None, None, :] & valid[:, None, :, None]
    if block_map is not None:
        allowed = allowed & block_map.to_tokens().to(q.device)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = changed(scores, torch.arange(rows, device=q.device), layout, logit, tokens)
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    # rows past the end of v's valid tokens may hold anything, NaN included: a weight of 0 must not read them
    values = v if layout is None else v.masked_fill(~layout.key_mask(batch, v.device)[:, :, None, None], 0)
    return torch.einsum("bhlm,bmhd->blhd", p.to(v.dtype), values), lse


def changed(
    scores: torch.Tensor,
    rows: torch.Tensor,
    layout: TokenLayout | None,
    logit: FarLogits | None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled scores [B, H, R, L] of the queries at positions `rows` int64 [R], as `logit` has them; see above."""
    reach = None if logit is None or layout is None else logit.reach(layout.grid)
    if reach is None or layout is None:
        return scores
    if tokens is None:
        tokens = torch.arange(layout.length, device=scores.device)[None]
    return reach.change(scores, tokens[:, rows], tokens, layout.video)
