"""The backward pass, which both backends share."""

import pytest
import torch
from inputs import BLOCKS, TORCH, make_layout, make_map, make_qkv

from videosparse.kernels import attend, torch_path
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.reference import attention_reference


def gradients(function, q, k, v, order=None):
    """Of a sum over the output; `order` is that in which channels are held, and products summed."""
    order = torch.arange(q.shape[3]) if order is None else order
    q, k, v = (x.detach()[..., order].requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)[..., order]
    # rows without keys have an lse of -inf, which no loss may touch
    loss = (out * weights).sum() + (torch.where(lse == -torch.inf, 0, lse) ** 2).sum().to(out.dtype)
    return [x[..., order.argsort()] for x in torch.autograd.grad(loss, (q, k, v))]


@pytest.mark.parametrize("share", ["shared", "per sample and head", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_accurate(share, dtype):
    layout = make_layout("ragged text").aligned((64, 64))
    block_map = None if share == "dense" else make_map(layout, (64, 64), share)
    index = None if block_map is None else block_map.index()
    # the reference multiplies NaN by 0 in its backward: here padding holds 7, and NaN has a test of its own
    q, k, v = (x.nan_to_num(7.0) for x in make_qkv(layout, dtype, dim=16))
    plain = lambda *x: attention_reference(*x, layout=layout, block_map=block_map)  # noqa: E731
    found = gradients(lambda *x: attend(*x, layout=layout, index=index, return_lse=True, options=TORCH), q, k, v)
    tries = [gradients(plain, q, k, v, torch.randperm(16)) for _ in range(8)]
    truth = gradients(plain, q.double(), k.double(), v.double())
    for name, ours, true, *eager in zip("qkv", found, truth, *tries, strict=True):
        error, allowed = worst_row(ours, true), max(allowed_error(true, x) for x in eager)
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("block", BLOCKS)
def test_invalid_tokens_get_no_gradient_and_leak_none(block):
    layout = make_layout("no text in one").aligned(block)
    index = make_map(layout, block).index()
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, torch.float32, dim=16))
    attend(q, k, v, layout=layout, index=index, options=TORCH).sum().backward()
    invalid = ~layout.key_mask(2, "cpu")
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad[invalid] == 0).all()


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 2000)
    layout = TokenLayout(VideoGrid(1, 7, 10), 5, text_start=72)
    index = make_map(layout, (64, 64), "per head", heads=2, density=0.7).index()
    q, k, v = (torch.randn(1, layout.length, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    function = lambda *x: attend(*x, layout=layout, index=index, options=TORCH)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


def test_only_wanted_gradients():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    attend(q, k, v.requires_grad_(), layout=layout, options=TORCH).sum().backward()
    assert q.grad is None
    assert v.grad is not None


def test_second_derivatives_are_refused():
    layout = make_layout("video")
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, torch.float32, dim=16))
    (grad,) = torch.autograd.grad(attend(q, k, v, layout=layout, options=TORCH).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
