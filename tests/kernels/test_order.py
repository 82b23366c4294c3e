"""Token orders on any machine: `reorder`, `norm_rotate` and `attend` in plain torch, families, graphs, gradients."""

import pytest
import torch
from inputs import LAYOUTS, TORCH, make_layout, make_map, make_qkv
from norms import FORMS
from orders import CODES, GRIDS, SIX, check_attend, check_norm, check_reorder, ordered_problem, project

from videosparse.kernels import attend, norm_rotate, reorder, reorder_op
from videosparse.kernels.stream import Stream
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import SearchedOrder, TokenOrder

LAYOUT = TokenLayout(SIX)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("text", "gap"), [(0, 0), (6, 0), (3, 5)])
def test_reorder(grid, text, gap):
    check_reorder(grid, text, gap, torch.float32, TORCH)


@pytest.mark.parametrize("view", ["fused", "head-major"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reorder_strides_and_dtypes(view, dtype):
    check_reorder(GRIDS[0], 2, 1, dtype, TORCH, view=view)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", [0, 5])
def test_norm_rotate(form, gap):
    check_norm(form, torch.float32, TORCH, gap=gap, grid=GRIDS[0], heads=6)


def test_norm_rotate_of_another_grid():
    stream = Stream(*(torch.zeros(1, 60, 48) for _ in range(2)), *(torch.ones(48) for _ in range(2)), 1e-6)
    with pytest.raises(ValueError, match=r"The order is for 24 video tokens, video.q has 60"):
        norm_rotate(stream, heads=6, order=TokenOrder(VideoGrid(2, 3, 4), CODES))
    with pytest.raises(ValueError, match=r"TokenOrder is for 6 heads on grid 3x4x5 \(got 3 heads"):
        norm_rotate(stream, heads=3, order=TokenOrder(GRIDS[0], CODES))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", [0, 5])
def test_families_step_by_step(form, gap):
    problem, order = ordered_problem(form, torch.float32, gap=gap, grid=GRIDS[0], heads=6)
    for found, raster in zip(project(problem, order, "off"), project(problem, None, "off"), strict=True):
        assert torch.equal(found, order.apply(raster, problem.layout))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", [None, (64, 64), (128, 64)])
def test_attend(kind, block):
    layout = make_layout(kind).aligned(block) if block else make_layout(kind)
    block_map = make_map(layout, block, "per head", heads=6) if block else None
    check_attend(layout, block_map, *make_qkv(layout, torch.float32, heads=6, dim=16), TORCH)


def test_an_order_that_the_device_knows():
    order, searched = TokenOrder(SIX, CODES), SearchedOrder(SIX, torch.tensor(CODES))
    x = torch.randn(1, SIX.tokens, 6, 8)
    assert torch.equal(reorder(x, searched, LAYOUT), order.apply(x, LAYOUT))
    searched.codes.copy_(torch.tensor(CODES[::-1]))
    assert torch.equal(reorder(x, searched, LAYOUT), TokenOrder(SIX, CODES[::-1]).apply(x, LAYOUT))


def test_an_order_made_in_inference_mode_serves_training():
    order = TokenOrder(SIX, CODES)
    with torch.inference_mode():
        order.table(torch.device("cpu"))
    x = torch.randn(1, SIX.tokens, 6, 8, requires_grad=True)
    reorder(x, order, LAYOUT).sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("inverse", [False, True])
def test_the_gradient_of_reorder_is_the_inverse(inverse):
    order = TokenOrder(GRIDS[0], CODES)
    layout = TokenLayout(GRIDS[0], 3, text_start=65)
    x = torch.randn(2, layout.length, 6, 4, requires_grad=True)
    grad = torch.randn(x.shape)
    reorder(x, order, layout, inverse=inverse).backward(grad)
    assert torch.equal(x.grad, (order.apply if inverse else order.restore)(grad, layout))


def test_the_gradient_of_joining():
    order = TokenOrder(GRIDS[0], CODES)
    layout = TokenLayout(GRIDS[0], 3, text_start=65)
    video, text = torch.randn(2, 60, 6, 4, requires_grad=True), torch.randn(2, 3, 6, 4, requires_grad=True)
    grad = torch.randn(2, 68, 6, 4)
    reorder(video, order, layout, text=text).backward(grad)
    assert torch.equal(video.grad, order.restore(grad, layout)[:, :60])
    assert torch.equal(text.grad, grad[:, 65:])


def test_gradients_of_attend_are_in_the_order_of_its_inputs():
    order = TokenOrder(SIX, CODES)
    index = make_map(LAYOUT, (64, 64), heads=6).index()
    values = make_qkv(LAYOUT, torch.float64, heads=6, dim=8)
    grad, grad_lse = torch.randn_like(values[0]), torch.randn(2, 6, SIX.tokens, dtype=torch.float64)
    plain, turned = ([x.clone().requires_grad_() for x in values] for _ in range(2))
    out, lse = attend(*plain, layout=LAYOUT, index=index, return_lse=True)
    level = order.apply(grad_lse.transpose(1, 2)[..., None], LAYOUT)[..., 0].transpose(1, 2)
    finite = lse.isfinite()
    ((out * order.apply(grad, LAYOUT)).sum() + (lse * level)[finite].sum()).backward()
    out, lse = attend(*turned, layout=LAYOUT, index=index, order=order, return_lse=True)
    ((out * grad).sum() + (lse * grad_lse)[lse.isfinite()].sum()).backward()
    for x, y in zip(plain, turned, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", [0, 3])
def test_the_op_is_well_formed(text):
    order = TokenOrder(GRIDS[0], CODES)
    x = torch.randn(2, 60, 6, 4, requires_grad=True)
    joined = torch.randn(2, text, 6, 4, requires_grad=True) if text else None
    table = order.table(torch.device("cpu"))
    torch.library.opcheck(reorder_op.reorder_op, (x, joined, table, 60, 4, 5, 62, False, "torch"))


class Graphs:
    """A torch.compile backend that counts graphs."""

    count = 0

    def __call__(self, module, inputs):
        self.count += 1
        return module


@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_serves_every_order(grad):
    torch._dynamo.reset()
    graphs = Graphs()
    index = make_map(LAYOUT, (64, 64), heads=6).index()
    ones = torch.ones(96)

    def block(q, k, v, order):
        if not grad:
            q, k = norm_rotate(Stream(q.flatten(2), k.flatten(2), ones, ones, 1e-6), heads=6, order=order)
        v = reorder(v, order, LAYOUT)
        out, lse = attend(q, k, v, layout=LAYOUT, index=index, order=order, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    for shift in range(6):
        order = TokenOrder(SIX, CODES[shift:] + CODES[:shift])
        order.table(torch.device("cpu"))  # as `RunTracker` does, outside the graph
        tensors = make_qkv(LAYOUT, torch.float32, heads=6, dim=16)
        tensors = [x.requires_grad_(grad) for x in tensors]
        for found, expected in zip(compiled(*tensors, order), block(*tensors, order), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert graphs.count == 1
