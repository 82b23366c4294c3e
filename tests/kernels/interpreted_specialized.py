"""The forward kernel that Triton specializes for Hopper, under Triton's interpreter: see interpreted.py."""

import pytest
import torch
from inputs import LAYOUTS, MAP_SHARES, TRITON, PoisonedEmpty, assert_accurate, make_layout, make_map, make_qkv

from videosparse.kernels import attend, gpu, specialized_forward
from videosparse.kernels.call import AttentionCall
from videosparse.layout import TokenLayout, VideoGrid

BLOCK = (128, 128)


@pytest.fixture(autouse=True)
def _only_the_specialized_kernel(monkeypatch):
    kernels = [("specialized Hopper kernel", specialized_forward)]
    monkeypatch.setattr(gpu, "special_kernels", lambda name, device: kernels if name == "attend" else [])
    monkeypatch.setattr("videosparse.kernels.triton_forward.forward", None)  # must not be reached
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


def run_and_check(layout, block_map, q, k, v, lse=True, **kwargs):
    index = None if block_map is None else block_map.index()
    got = attend(q, k, v, layout=layout, index=index, return_lse=lse, options=TRITON, **kwargs)
    out, level = got if lse else (got, None)
    assert_accurate(out, level, q, k, v, layout=layout, block_map=block_map, **kwargs)
    assert out.is_contiguous()
    assert level is None or level.is_contiguous()


@pytest.mark.parametrize("tokens", [300, 384])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("lse", [True, False])
def test_lengths(tokens, sparse, lse):
    layout = TokenLayout(VideoGrid(1, 1, tokens))
    block_map = make_map(layout, BLOCK, heads=1) if sparse else None
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=1, dim=128), lse=lse)


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["fused", "head-major"])
def test_shared_maps_and_strides(share, view):
    layout = TokenLayout(VideoGrid(1, 10, 23))
    block_map = make_map(layout, BLOCK, share, heads=2)
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=2, dim=128, view=view), lse=False)


@pytest.mark.parametrize("tokens", [1, 127, 128, 256])
def test_few_tokens(tokens):
    layout = TokenLayout(VideoGrid(1, 1, tokens))
    run_and_check(layout, None, *make_qkv(layout, torch.float16, batch=1, heads=2, dim=128))


def test_scores_far_below_zero():
    """A key past the end, read as 0, has the highest score by far."""
    layout = TokenLayout(VideoGrid(1, 10, 23))
    q, k, v = make_qkv(layout, torch.float16, heads=1, dim=128)
    run_and_check(layout, make_map(layout, BLOCK, heads=1), q.abs() + 4, -k.abs() - 4, v, scale=0.5)


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "video"])
def test_text_is_left_to_others(kind):
    layout = make_layout(kind).aligned(BLOCK)
    q, k, v = make_qkv(layout, torch.float16, heads=1, dim=128)
    call = AttentionCall(None, layout.seq_lens, layout.video, layout.text_start, 0.1)
    assert specialized_forward.unsuited(q, k, v, call) == "it takes video without text"


def test_token_orders_are_left_to_others():
    q = torch.zeros(1, 128, 2, 128, dtype=torch.float16)
    call = AttentionCall(None, None, 128, 128, 0.1, order=torch.zeros(2, 8, dtype=torch.int32))
    assert specialized_forward.unsuited(q, q, q, call) == "it takes calls without a token order"
