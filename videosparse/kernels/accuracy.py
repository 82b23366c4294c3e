"""How far attention may be from the truth: at most twice as far as plain torch in the same precision.

The criterion is that of FlashAttention's tests, with their allowance for rounding. Nothing else decides whether a
kernel is right, in tests and before a timing is kept. It differs in two ways, both so that fresh inputs cannot fail by
chance: the error of a row is its root mean square over head_dim, not its worst element, and plain torch is asked
several times: summing the scores in other orders, and with exponentials of base 2, which are what the hardware has. A
log-sum-exp of base 2 is larger by 1 / ln 2, and rounded at that magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from videosparse.blocks import BlockMap
from videosparse.layout import TokenLayout
from videosparse.logits import FarLogits
from videosparse.reference import changed

OTHER_ORDERS = 2


@dataclass(frozen=True)
class Accuracy:
    """Errors of the worst row against fp64, and the largest allowed ones.

    Args:
        error, allowed: of the output, absolute, root mean square over head_dim.
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
    base: float = math.e,
    logit: FarLogits | None = None,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` for chosen query rows, so that long sequences can be checked too.

    Args:
        q, k, v: [B, L, H, D]; their dtype is the precision.
        rows: int64 [R], query positions.
        layout, block_map, scale, logit, tokens: as in `attention_reference`.
        base: of the exponentials, e or 2; the results are the same but for rounding.

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
    scores = changed(scores, rows, layout, logit, tokens).masked_fill(~allowed, -torch.inf)
    if base == 2:
        scores = scores / math.log(2)
        top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        lse = top[..., 0] + torch.log2(torch.exp2(scores - top).sum(-1))
        p = torch.exp2(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        lse = lse * math.log(2)
    else:
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
    logit: FarLogits | None = None,
    tokens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> Accuracy:
    """Judge an output of `attend`.

    Args:
        out, lse: what is judged, [B, L, H, D] and [B, H, L] or None.
        q, k, v, layout, block_map, scale, logit, tokens: what it was made from.
        rows: int64 [R], query positions to look at; None looks at all. Memory grows with B x H x R x L.
    """
    rows = torch.arange(layout.length, device=q.device) if rows is None else rows

    def plain(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, base: float = math.e
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return attend_rows(
            q, k, v, rows, layout=layout, block_map=block_map, scale=scale, base=base, logit=logit, tokens=tokens
        )

    true_out, true_lse = plain(q.double(), k.double(), v.double())
    empty = true_lse == -torch.inf
    read = ~empty.transpose(1, 2)
    orders = [torch.arange(q.shape[3]), *(torch.randperm(q.shape[3]) for _ in range(OTHER_ORDERS))]
    tries = [plain(q[..., order], k[..., order], v, base) for order in orders for base in (math.e, 2)]
    error = worst_row(out[:, rows][read], true_out[read])
    allowed = max(allowed_error(true_out[read], x[read]) for x, _ in tries)
    right = bool((out[:, rows][~read] == 0).all())
    if lse is None:
        return Accuracy(error, allowed, 0.0, 0.0, right)
    found, truth = lse[:, :, rows], true_lse[~empty][:, None]
    right = right and torch.equal(found == -torch.inf, empty)
    lse_error = worst_row(found[~empty][:, None], truth)
    lse_allowed = max(allowed_error(truth, x[~empty][:, None]) for _, x in tries)
    return Accuracy(error, allowed, lse_error, lse_allowed, right)


def worst_row(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest root-mean-square error along the last dimension; NaN if there is one, 0 for no rows."""
    error = (x.double() - truth.double()).square().mean(-1).sqrt()
    return float(error.max()) if error.numel() else 0.0


def allowed_error(truth: torch.Tensor, plain: torch.Tensor) -> float:
    """Twice the error of a plain computation, plus twice what one addition rounds away at this magnitude.

    Args:
        truth: float64 result, rows along the last dimension.
        plain: the same by plain torch in the precision that is judged.
    """
    rounded = truth.to(plain.dtype)
    return 2 * (worst_row(plain, truth) + worst_row(rounded + 0.3 - 0.3, rounded))
