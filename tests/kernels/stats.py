"""What `block_stats` should give, from the whole probability matrix; shared by its tests."""

import math

import torch

from videosparse.kernels import attend, block_stats
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.layout import ceil_div

EPS = 1e-3
ORDERS = 16


def probabilities(q, k, lse, layout, block, dtype, scale=None, base=math.e):
    """[B, H, Mq, b0, Nk, b1] of entries, -1 where there is none, with exponentials of a given base."""
    valid = layout.key_mask(q.shape[0], q.device)
    q, k = (x.masked_fill(~valid[:, :, None, None], 0).to(dtype) for x in (q, k))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * ((q.shape[3] ** -0.5 if scale is None else scale) / math.log(base))
    level = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf) / math.log(base)
    p = torch.exp2(scores - level[..., None]) if base == 2 else torch.exp(scores - level[..., None])
    p = p.masked_fill(~(valid[:, None, None, :] & valid[:, None, :, None]), -1)
    rows, cols = (ceil_div(layout.length, b) for b in block)
    padding = (0, cols * block[1] - layout.length, 0, rows * block[0] - layout.length)
    p = torch.nn.functional.pad(p, padding, value=-1)
    return p.unflatten(3, (cols, block[1])).unflatten(2, (rows, block[0]))


def share_below(p, eps):
    """Share of the entries below eps; 1 where there are none."""
    entries = (p >= 0).sum((3, 5))
    share = ((p >= 0) & (p < eps)).sum((3, 5)) / entries.clamp(min=1)
    return torch.where(entries > 0, share, 1.0)


def sums(p):
    return p.clamp(min=0).sum((3, 5))


def peaks(p):
    return p.clamp(min=0).amax((3, 5))


def check_stats(layout, block, make_qkv, dtype, options, **sizes):
    """Sums and largest entries as exact as plain torch in fp32; counts but for entries at the border.

    Plain torch is asked in many orders, and in two bases: an error of a largest entry is that of one score, and of six
    such errors the largest may be small by chance, as once it was.
    """
    scale = sizes.pop("scale", None)
    q, k, v = make_qkv(layout, dtype, **sizes)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, scale=scale, options=sizes.get("lse_options", options))
    found = block_stats(q, k, lse, layout=layout, block=block, scale=scale, eps=EPS, options=options)
    truth = probabilities(q, k, lse, layout, block, torch.float64, scale)
    true = [sums(truth), peaks(truth)]
    allowed = [0.0, 0.0]
    for base in (math.e, 2) * ORDERS:
        order = torch.randperm(q.shape[3], device=q.device)
        plain = probabilities(q[..., order], k[..., order], lse, layout, block, torch.float32, scale, base)
        again = [allowed_error(x, reduce(plain)) for x, reduce in zip(true, (sums, peaks), strict=True)]
        allowed = [max(pair) for pair in zip(allowed, again, strict=True)]
    for ours, x, bound in zip((found.sums, found.peaks), true, allowed, strict=True):
        error = worst_row(ours, x)
        assert error <= bound, (error, bound)
    low, high = share_below(truth, EPS * (1 - 1e-4)), share_below(truth, EPS * (1 + 1e-4))
    assert (found.small >= low - 1e-6).all()
    assert (found.small <= high + 1e-6).all()
    assert torch.equal(found.entries.expand_as(found.sums), (truth >= 0).sum((3, 5)).float())
