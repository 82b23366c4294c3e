"""Inputs of the tests of `FarLogits`, and what a call with it has to equal."""

import torch
from inputs import assert_accurate, assert_sums_accurate, make_qkv
from orders import CODES

from videosparse.kernels import KernelOptions, attend, block_stats, block_sums
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.logits import FarLogits
from videosparse.ordering import TokenOrder

GRID = VideoGrid(8, 4, 10)
"""320 tokens. With six trained frames 120 apart is far: tiles of 64 are near, on the border, and far."""

FAR = FarLogits(trained=6, alpha=0.5)
"""Stronger than published, so that a score which is missed shows."""


def with_far(options, logit=FAR):
    return KernelOptions(backend=options.backend, logit=logit)


def order_for(layout, heads):
    return TokenOrder(layout.grid, (CODES * heads)[:heads])


def tokens_of(order, layout, device="cpu"):
    """int64 [H, L]: what `attention_reference` asks for."""
    rest = torch.arange(layout.video, layout.length, device=device).expand(order.heads, -1)
    return torch.cat([order.permutation(device), rest], 1)


def check_attend(layout, block_map, q, k, v, options, *, order=None, logit=FAR, **kwargs):
    """Out and lse against fp64, and not what they are without."""
    index = None if block_map is None else block_map.index()
    call = {"layout": layout, "index": index, "order": order, **kwargs}
    out, lse = attend(q, k, v, **call, return_lse=True, options=with_far(options, logit))
    assert out.is_contiguous()
    plain = attend(q, k, v, **call, options=options)
    assert not torch.allclose(out, plain, atol=1e-2)
    assert torch.equal(attend(q, k, v, **call, options=with_far(options, logit)), out)
    tokens = None
    if order is not None:
        tokens = tokens_of(order, layout, q.device)
        out = order.apply(out, layout)
        lse = order.apply(lse.transpose(1, 2)[..., None].contiguous(), layout)[..., 0].transpose(1, 2)
    assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map, logit=logit, tokens=tokens, **kwargs)


def probabilities(q, k, lse, layout, dtype, logit=FAR, tokens=None, scale=None):
    """exp(score - lse) of valid rows and keys [B, H, L, L], 0 elsewhere."""
    valid = layout.key_mask(q.shape[0], q.device)
    q, k = (x.masked_fill(~valid[:, :, None, None], 0).to(dtype) for x in (q, k))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    tokens = torch.arange(layout.length, device=q.device)[None] if tokens is None else tokens
    reach = logit.reach(layout.grid)
    scores = scores if reach is None else reach.change(scores, tokens, tokens, layout.video)
    p = torch.exp(scores - lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)[..., None])
    return p.masked_fill(~valid[:, None, None, :], 0).masked_fill(~valid[:, None, :, None], 0)


def in_blocks(p, block):
    """[B, H, L, L] as [B, H, rows, cols, entries of a block]."""
    rows, cols = (ceil_div(p.shape[2], b) for b in block)
    p = torch.nn.functional.pad(p, (0, cols * block[1] - p.shape[3], 0, rows * block[0] - p.shape[2]))
    return p.unflatten(3, (cols, block[1])).unflatten(2, (rows, block[0])).transpose(3, 4).flatten(4)


def check_sums(layout, block, dtype, options, *, sample=None, heads=2, dim=16, device="cpu"):
    """Block sums from the lse of the same option, against fp64."""
    q, k, v = make_qkv(layout, dtype, heads=heads, dim=dim, device=device)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=with_far(options))
    found = block_sums(q, k, lse, layout=layout, block=block, sample=sample, options=with_far(options))
    seen, factor = lse, 1.0
    if sample is not None:
        position = torch.arange(layout.length, device=device)
        visited = position % (block[0] // sample) == 0
        valid = layout.key_mask(q.shape[0], q.device)
        counts = [in_rows(x, block[0]) for x in (valid, valid & visited)]
        factor = (counts[0] / counts[1].clamp(min=1))[:, None, :, None]
        seen = lse.masked_fill(~visited, -torch.inf)
    assert_sums_accurate(found, q, k, seen, layout, block, logit=FAR, factor=factor)
    without = block_sums(q, k, lse, layout=layout, block=block, sample=sample, options=options)
    assert not torch.allclose(found, without, rtol=1e-2)


def in_rows(valid, rows):
    return torch.nn.functional.pad(valid, (0, -valid.shape[1] % rows)).unflatten(1, (-1, rows)).sum(2)


def check_stats(grid, dtype, options, *, code, heads=2, dim=16, device="cpu"):
    """Sums, peaks and shares of small entries in an order, against fp64."""
    layout, order = TokenLayout(grid), TokenOrder(grid, (code,) * heads)
    q, k, v = make_qkv(layout, dtype, heads=heads, dim=dim, device=device)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=with_far(options))
    q, k = order.apply(q, layout), order.apply(k, layout)
    lse = order.apply(lse.transpose(1, 2)[..., None].contiguous(), layout)[..., 0].transpose(1, 2).contiguous()
    found = block_stats(q, k, lse, layout=layout, block=(64, 64), order=order, options=with_far(options))
    p = in_blocks(probabilities(q, k, lse, layout, torch.float64, tokens=tokens_of(order, layout, device)), (64, 64))
    torch.testing.assert_close(found.sums.double(), p.sum(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.peaks.double(), p.amax(4), rtol=1e-4, atol=1e-4)
