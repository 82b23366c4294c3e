"""Judge of gradients: within twice the error of plain torch in the same precision, against fp64."""

import math

import torch
from inputs import poison

from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.reference import attention_reference


def make_grads(layout, q, *, lse=True):
    """Gradients of out and lse (or None) for q [B, L, H, D], NaN where no valid token is."""
    grad = poison(torch.randn(q.shape, device=q.device), layout).to(q.dtype)
    if not lse:
        return grad, None
    grad_lse = poison(torch.randn(*q.shape[:3], 1, device=q.device), layout)
    return grad, grad_lse[..., 0].transpose(1, 2).contiguous()


def plain_gradients(q, k, v, grad, grad_lse, **kwargs):
    """dq, dk, dv by autograd in the precision of the inputs; padding counts as 0, for autograd multiplies it by 0."""
    q, k, v = (x.nan_to_num().requires_grad_() for x in (q, k, v))
    out, lse = attention_reference(q, k, v, **kwargs)
    loss = (out * grad.nan_to_num()).sum()
    if grad_lse is not None:
        # rows without keys have an lse of -inf, which no loss may touch
        loss = loss + (torch.where(lse == -torch.inf, 0, lse) * grad_lse.nan_to_num()).sum().to(loss.dtype)
    return torch.autograd.grad(loss, (q, k, v))


def gradients_in_base_2(q, k, v, grad, grad_lse, *, layout, block_map=None, scale=None):
    """The same by the formula that kernels follow, with the exponentials of base 2 that the hardware has.

    A log-sum-exp of base 2 is larger by 1 / ln 2, and weights lose as much by its rounding.
    """
    q, k, v, grad = (x.nan_to_num() for x in (q, k, v, grad))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = attention_reference(q, k, v, layout=layout, block_map=block_map, scale=scale)
    valid = layout.key_mask(q.shape[0], q.device)
    allowed = valid[:, None, None, :] & valid[:, None, :, None]
    if block_map is not None:
        allowed = allowed & block_map.to_tokens().to(q.device)
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse.nan_to_num()
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).float() * (scale / math.log(2))
    level = lse.masked_fill(lse == -torch.inf, 0.0) / math.log(2)
    p = torch.exp2(scores - level[..., None]).masked_fill(~allowed, 0)
    ds = p * (torch.einsum("blhd,bmhd->bhlm", grad, v).float() - delta[..., None]) * scale
    p, ds = p.to(q.dtype), ds.to(q.dtype)
    dq = torch.einsum("bhlm,bmhd->blhd", ds, k)
    dk = torch.einsum("bhlm,blhd->bmhd", ds, q)
    return dq, dk, torch.einsum("bhlm,blhd->bmhd", p, grad)


def assert_gradients(found, q, k, v, grad, grad_lse, *, layout, block_map=None, scale=None):
    """Raise unless dq, dk, dv are as accurate as plain torch, and 0 where no valid token is."""
    kwargs = {"layout": layout, "block_map": block_map, "scale": scale}
    wide = None if grad_lse is None else grad_lse.double()
    truth = plain_gradients(q.double(), k.double(), v.double(), grad.double(), wide, **kwargs)
    # what an lse of base 2 loses drowns in 16 bits
    formulas = (plain_gradients, gradients_in_base_2) if q.dtype == torch.float32 else (plain_gradients,)
    tries = []
    for _ in range(6):  # the products along head_dim summed in several orders
        order = torch.randperm(q.shape[3], device=q.device)
        for formula in formulas:
            plain = formula(*(x[..., order] for x in (q, k, v, grad)), grad_lse, **kwargs)
            tries.append([x[..., order.argsort()] for x in plain])
    invalid = ~layout.key_mask(q.shape[0], q.device)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert found[i].dtype == q.dtype
        assert found[i].is_contiguous()
        error = worst_row(found[i], truth[i])
        allowed = max(allowed_error(truth[i], x[i]) for x in tries)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        assert (found[i][invalid] == 0).all(), f"{name} is not 0 at positions without a token"
