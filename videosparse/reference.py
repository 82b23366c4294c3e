"""The oracle: attention in plain torch, in the precision of its inputs. Every kernel is judged against it."""

from __future__ import annotations

import torch

from videosparse.blocks import BlockMap
from videosparse.checking import check_scale, check_tensor, shown
from videosparse.layout import TokenLayout, check_is_layout
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
        q, k, v: [B, L, H, D], any float dtype; pass float64 for the truth. Without a layout, k and v may be of another
            length than q.
        layout: which positions hold tokens; None when all do.
        block_map: which blocks are read; None reads all.
        scale: factor of the scores; default D ** -0.5.
        logit: what is done to the scores; needs a layout.
        tokens: int64 [H or 1, L], the raster token that each position holds, for `logit` where q, k and v come in
            another order; None is raster order.

    Returns:
        out [B, L, H, D] in the dtype of q, and lse [B, H, L] (natural log; float64 for float64 inputs, else float32).
        A row that reads no key, and a row that is no valid token, gives 0 and -inf.

    Raises:
        TypeError: an argument of another type, or dtypes that differ or are no float.
        ValueError: shapes that do not fit one another, the layout or the map; a scale that is not finite; a logit
            without a layout.
    """
    _check_tensors(q, k, v)
    _check_pattern(q, k, layout, block_map)
    _check_logit(q, layout, logit, tokens)
    if scale is not None:
        check_scale(scale)
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


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, x, " [batch, length, heads, head_dim]")
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, length, heads, head_dim] (got {list(x.shape)}).")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise TypeError(f"{name} must be of one float dtype with q, {q.dtype} (got {x.dtype}); cast one of them.")
    wanted = (q.shape[0], k.shape[1], *q.shape[2:])
    for name, x in {"k": k, "v": v}.items():
        if x.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, as q and k have it (got {list(x.shape)}).")


def _check_pattern(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout | None, block_map: BlockMap | None) -> None:
    (batch, rows, heads, _), columns = q.shape, k.shape[1]
    if layout is not None:
        check_is_layout(layout)
        if not layout.length == rows == columns:
            raise ValueError(f"layout must be of {rows} and {columns} tokens, as q and k are (got {layout.length}).")
    if block_map is None:
        return
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map must be a BlockMap or None (got {shown(block_map)}).")
    samples, sharing = block_map.keep.shape[:2]
    if (block_map.q_len, block_map.kv_len) != (rows, columns) or samples not in (1, batch) or sharing not in (1, heads):
        raise ValueError(
            f"block_map must be for {rows} x {columns} tokens, {batch} samples and {heads} heads, or 1 of these for "
            f"all (got {block_map.q_len} x {block_map.kv_len}, {samples} and {sharing})."
        )


def _check_logit(
    q: torch.Tensor, layout: TokenLayout | None, logit: FarLogits | None, tokens: torch.Tensor | None
) -> None:
    if logit is not None and not isinstance(logit, FarLogits):
        raise TypeError(f"logit must be FarLogits or None (got {shown(logit)}).")
    if logit is not None and layout is None:
        raise ValueError("logit needs a layout, which knows the frames (got None); pass layout=.")
    if tokens is None:
        return
    check_tensor("tokens", tokens, " of int64 [heads or 1, length]")
    if tokens.dtype != torch.int64 or tuple(tokens.shape) not in ((1, q.shape[1]), (q.shape[2], q.shape[1])):
        raise ValueError(
            f"tokens must be int64 [{q.shape[2]} or 1, {q.shape[1]}] (got {tokens.dtype} {list(tokens.shape)})."
        )


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
