"""Inputs of the tests of token orders: every code, odd grids, and what attention in an order has to equal."""

import torch
from norms import make_problem

from videosparse.kernels import KernelOptions, attend, norm_rotate, reorder
from videosparse.kernels.accuracy import measure
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models import FAMILIES
from videosparse.ordering import TokenOrder
from videosparse.policies.base import LayerPlan, Mode

GRIDS = [VideoGrid(3, 4, 5), VideoGrid(1, 7, 2), VideoGrid(5, 1, 1), VideoGrid(1, 1, 1), VideoGrid(2, 1, 9)]
CODES = (3, 0, 5, 1, 4, 2)
SIX = VideoGrid(3, 9, 10)  # 270 tokens: no block size divides them


def check_reorder(grid, text, gap, dtype, options, *, heads=6, dim=8, batch=2, device="cpu", view="contiguous"):
    """Both ways and joining text, bit by bit against `TokenOrder`, NaN in memory that is not to be read."""
    layout = TokenLayout(grid, text, text_start=grid.tokens + gap if text else -1)
    order = TokenOrder(grid, (CODES * heads)[:heads])
    shape = (batch, layout.length, heads, dim)
    x = torch.randint(-30000, 30000, shape, device=device, dtype=torch.int16)
    if view == "fused":
        wide = torch.full((batch, layout.length, 3, heads, dim), torch.nan, device=device, dtype=dtype)
        wide[:, :, 1] = x.to(dtype)
        x = wide[:, :, 1]
    elif view == "head-major":
        x = x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = x.to(dtype)
    found = reorder(x, order, layout, options=options)
    assert torch.equal(found, order.apply(x, layout))
    assert found.is_contiguous()
    assert torch.equal(reorder(found, order, layout, inverse=True, options=options), x)
    assert torch.equal(reorder(x, order, layout, inverse=True, options=options), order.restore(x, layout))
    if text:
        joined = reorder(x[:, : layout.video], order, layout, text=x[:, layout.text_start :], options=options)
        assert torch.equal(joined[:, : layout.video], found[:, : layout.video])
        assert (joined[:, layout.video : layout.text_start] == 0).all()
        assert torch.equal(joined[:, layout.text_start :], x[:, layout.text_start :])


def ordered_problem(form, dtype, **kwargs):
    """A call of a family's `project`, and an order for it."""
    problem = make_problem(form, dtype, **kwargs)
    return problem, TokenOrder(problem.layout.grid, (CODES * problem.attn.heads)[: problem.attn.heads])


def check_norm(form, dtype, options, **kwargs):
    """`norm_rotate` in an order is `norm_rotate`, then the order, bit by bit."""
    problem, order = ordered_problem(form, dtype, **kwargs)
    video, text = problem.streams()
    start = None if text is None else problem.layout.text_start
    call = {"heads": problem.attn.heads, "rotary": problem.turns(), "text_start": start, "options": options}
    raster = norm_rotate(video, text, **call)
    for found, expected in zip(norm_rotate(video, text, **call, order=order), raster, strict=True):
        assert torch.equal(found, order.apply(expected, problem.layout))


def project(problem, order, fused_norm, backend="auto"):
    """q, k, v of a family in an order."""
    family = FAMILIES[{"wan": "wan", "hun": "hunyuan_video", "moc": "mochi"}[problem.form[:3]]]
    options = KernelOptions(backend=backend, fused_norm=fused_norm)
    plan = LayerPlan(Mode.SPARSE, problem.layout, order=order, options=options)
    with torch.no_grad():
        return family.project(problem.attn, problem.values["q"], problem.values.get("tq"), problem.rotary, plan)


def check_attend(layout, block_map, q, k, v, options, order=None):
    """In an order, out and lse are bit by bit those of a call on q, k, v as they are, turned back; and accurate."""
    heads = q.shape[2]
    order = TokenOrder(layout.grid, (CODES * heads)[:heads]) if order is None else order
    index = None if block_map is None else block_map.index()
    call = {"layout": layout, "index": index, "options": options}
    plain = attend(q, k, v, **call, return_lse=True)
    out, lse = attend(q, k, v, **call, order=order, return_lse=True)
    assert torch.equal(out, order.restore(plain[0], layout))
    assert torch.equal(lse, order.restore(plain[1].transpose(1, 2)[..., None], layout)[..., 0].transpose(1, 2))
    assert out.is_contiguous()
    assert torch.equal(attend(q, k, v, **call, order=order), order.restore(attend(q, k, v, **call), layout))
    found = measure(*plain, q, k, v, layout=layout, block_map=block_map)
    assert found.ok, found
