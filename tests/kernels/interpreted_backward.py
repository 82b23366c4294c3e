"""The backward kernels under Triton's interpreter, portable ones and Hopper's: see interpreted.py."""

import pytest
import torch
from gradients import assert_gradients, make_grads
from inputs import (
    BLOCKS,
    LAYOUTS,
    MAP_SHARES,
    TRITON,
    PoisonedEmpty,
    assert_same_of_both_ids,
    make_layout,
    make_map,
    make_qkv,
    poison,
)

from videosparse.kernels import attend, gpu, hopper_backward
from videosparse.layout import TokenLayout, VideoGrid

SMALL = VideoGrid(2, 7, 10)


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.fixture(params=["portable", "hopper"])
def kernels(request, monkeypatch):
    """Which kernels a backward pass takes."""
    if request.param == "hopper":
        take_hopper(monkeypatch)
    return request.param


def take_hopper(monkeypatch):
    def special(name, device):
        return hopper_backward if name == "gradients of attend" else None

    monkeypatch.setattr(gpu, "special_kernel", special)
    monkeypatch.setattr(hopper_backward, "unsuited", lambda *call: None)


def run_and_check(layout, block_map, q, k, v, *, with_lse=True, **kwargs):
    grad, grad_lse = make_grads(layout, q, lse=with_lse)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    index = None if block_map is None else block_map.index()
    out, lse = attend(*inputs, layout=layout, index=index, return_lse=True, options=TRITON, **kwargs)
    if with_lse:
        found = torch.autograd.grad((out, lse), inputs, (grad, grad_lse))
    else:
        found = torch.autograd.grad(out, inputs, grad)
    q, k, v = (x.detach() for x in inputs)
    assert_gradients(found, q, k, v, grad, grad_lse, layout=layout, block_map=block_map, **kwargs)
    return found


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("sparse", [True, False])
def test_layouts(kind, sparse, kernels):
    layout = make_layout(kind, grid=SMALL).aligned((64, 64))
    block_map = make_map(layout, (64, 64), heads=2) if sparse else None
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=2, dim=16))


@pytest.mark.parametrize("kind", ["text", "ragged text"])
@pytest.mark.parametrize("block", [None, (64, 64)])
def test_text_without_a_gap(kind, block, kernels):
    layout = make_layout(kind, grid=SMALL)
    block_map = None if block is None else make_map(layout, block, heads=1)
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=1, dim=16))


def test_a_gap_that_ends_inside_a_tile(kernels):
    layout = TokenLayout(SMALL, 40, text_start=150)
    run_and_check(layout, None, *make_qkv(layout, torch.float16, heads=1, dim=16))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blocks_and_dtypes(block, dtype):
    layout = make_layout("ragged text", grid=SMALL).aligned(block)
    run_and_check(layout, make_map(layout, block, heads=1), *make_qkv(layout, dtype, heads=1, dim=32))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_on_hopper(block, monkeypatch):
    take_hopper(monkeypatch)
    layout = make_layout("ragged text", grid=SMALL).aligned(block)
    run_and_check(layout, make_map(layout, block, heads=1), *make_qkv(layout, torch.float16, heads=1, dim=32))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["fused", "head-major"])
def test_shared_maps_and_strides(share, view, kernels):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    block_map = make_map(layout, (64, 64), share, heads=2)
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=2, dim=16, view=view), with_lse=False)


@pytest.mark.parametrize("dim", [8, 12, 80, 128])
def test_head_dims(dim, kernels):
    if kernels == "hopper" and dim % 8:
        pytest.skip("descriptors need rows of whole 16 bytes")
    layout = make_layout("video", grid=SMALL)
    run_and_check(layout, make_map(layout, (64, 64), heads=1), *make_qkv(layout, torch.float16, heads=1, dim=dim))


@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_scale(scale, kernels):
    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    run_and_check(layout, None, *make_qkv(layout, torch.float16, batch=1, heads=1, dim=16), scale=scale)


def test_scores_far_below_zero_do_not_overflow(kernels):
    """exp(0 - lse) of a key that is no token is beyond every format.

    One channel carries the offset, -20 * 20 * 16 ** -0.5 = -100: were it all of them, the softmax would have but one
    key, and its gradient a relative error without bound, in plain torch too.
    """
    layout = make_layout("ragged text", grid=VideoGrid(1, 7, 10)).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=1, dim=16)
    q[..., 0], k[..., 0] = 20, -20
    q, k = poison(q, layout), poison(k, layout)
    run_and_check(layout, make_map(layout, (64, 64), density=1.0), q, k, v)


def test_equal_inputs_give_equal_bits_whatever_the_order_of_work(kernels):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, torch.float16, heads=2, dim=16))
    grad, _ = make_grads(layout, q, lse=False)
    index = make_map(layout, (64, 64), "per head", heads=2).index()
    runs = []
    for _ in range(2):
        out = attend(q, k, v, layout=layout, index=index, options=TRITON)
        runs.append(torch.autograd.grad(out, (q, k, v), grad))
        for order in (index.order, index.key_major.order):
            order[:-1] = order[:-1].flip(0)  # the last entry counts the long rows
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_expanded_and_transposed_gradients(kernels):
    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, torch.float16, heads=2, dim=16))
    for grad in (
        torch.ones((), dtype=torch.float16).expand(q.shape),
        torch.randn(q.shape[::-1]).half().permute(3, 2, 1, 0),
    ):
        out = attend(q, k, v, layout=layout, options=TRITON)
        found = torch.autograd.grad(out, (q, k, v), grad)
        assert_gradients(found, *(x.detach() for x in (q, k, v)), grad, None, layout=layout)


def test_compiled_and_checkpointed(kernels):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    index = make_map(layout, (64, 64), "per head", heads=1).index()
    inputs = [x.requires_grad_() for x in make_qkv(layout, torch.float16, heads=1, dim=16)]
    grads = make_grads(layout, inputs[0])
    call = lambda *x: attend(*x, layout=layout, index=index, return_lse=True, options=TRITON)  # noqa: E731
    expected = torch.autograd.grad(call(*inputs), inputs, grads)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for other in (compiled, lambda *x: torch.utils.checkpoint.checkpoint(call, *x, use_reentrant=False)):
        for first, again in zip(expected, torch.autograd.grad(other(*inputs), inputs, grads), strict=True):
            assert torch.equal(first, again)


def test_ids_of_both_sizes_give_the_same(kernels, monkeypatch):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    inputs = [x.requires_grad_() for x in make_qkv(layout, torch.float16, heads=2, dim=16)]
    grad, _ = make_grads(layout, inputs[0], lse=False)
    call = lambda x: attend(*inputs, layout=layout, index=x, options=TRITON)  # noqa: E731
    block_map = make_map(layout, (64, 64), "per head", heads=2)
    assert_same_of_both_ids(lambda x: torch.autograd.grad(call(x), inputs, grad), block_map, monkeypatch)


def test_key_major_lists_are_made_when_the_graph_brings_none():
    from videosparse.kernels import ops

    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=2, dim=16)
    grad, _ = make_grads(layout, q, lse=False)
    block_map = make_map(layout, (64, 128), "per head", heads=2)
    index = block_map.index()
    out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON)
    lists = (index.row_ptr, index.ids, index.order, layout.seq_lens, layout.video, layout.text_start)
    arguments = (*lists, *index.block, *index.shape[:2], 0.25, None, 0, 0, 0, "triton", None, None, None)
    found = ops.attend_backward(grad, None, q, k, v, out, lse, *arguments)
    assert_gradients(found, q, k, v, grad, None, layout=layout, block_map=block_map)


@pytest.mark.parametrize("dimension", ["sample", "token", "head"])
def test_offsets_beyond_32_bits(dimension):
    """Strides below 2^31 whose last multiple is above; only the touched pages of the storage exist."""
    layout = TokenLayout(VideoGrid(1, 1, 70))
    batch = heads = 3
    dim = 16
    strides = {
        "sample": (2**30 + 64, heads * dim, dim, 1),
        "token": (heads * dim, 2**25 + 64, dim, 1),
        "head": (70 * dim, dim, 2**30 + 64, 1),
    }[dimension]
    size = 1 + sum((n - 1) * s for n, s in zip((batch, 70, heads, dim), strides, strict=True))
    storage = torch.empty.empty(size + 4 * 8192, dtype=torch.float16)
    small = make_qkv(layout, torch.float16, batch=batch, heads=heads, dim=dim)
    small.append(make_grads(layout, small[0], lse=False)[0])
    *views, grad = (storage.as_strided(x.shape, strides, i * 8192).copy_(x) for i, x in enumerate(small))
    views = [x.requires_grad_() for x in views]
    found = torch.autograd.grad(attend(*views, layout=layout, options=TRITON), views, grad)
    assert_gradients(found, *small, None, layout=layout)


def test_a_forward_without_lse_is_refused():
    from videosparse.kernels import ops

    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, torch.float16, heads=1, dim=16))
    geometry = (None, None, None, None, layout.video, layout.video, 0, 0, 1, 1, 0.25, None, 0, 0, 0)
    out, _ = ops.attend_forward(q, k, v, *geometry, False, "triton", None, False, None, None, None)
    with pytest.raises(RuntimeError, match="need_grad=True"):
        out.sum().backward()
