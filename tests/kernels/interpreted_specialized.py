"""The forward kernel that Triton specializes for Hopper, under Triton's interpreter: see interpreted.py."""

import pytest
import torch
from inputs import LAYOUTS, MAP_SHARES, TRITON, PoisonedEmpty, assert_accurate, make_layout, make_map, make_qkv

from videosparse.kernels import attend, gpu, specialized_forward
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


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_layouts(kind, sparse, aligned):
    layout = make_layout(kind)
    layout = layout.aligned(BLOCK) if aligned else layout
    block_map = make_map(layout, BLOCK, heads=1) if sparse else None
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=1, dim=128))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["fused", "head-major"])
def test_shared_maps_and_strides(share, view):
    layout = make_layout("ragged text", grid=VideoGrid(1, 10, 13)).aligned(BLOCK)
    block_map = make_map(layout, BLOCK, share, heads=2)
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=2, dim=128, view=view), lse=False)


@pytest.mark.parametrize("tokens", [1, 127, 128, 256])
def test_few_tokens(tokens):
    layout = TokenLayout(VideoGrid(1, 1, tokens))
    run_and_check(layout, None, *make_qkv(layout, torch.float16, batch=1, heads=2, dim=128))


def test_scores_far_below_zero():
    """A key that is no token, read as 0, has the highest score by far."""
    layout = make_layout("ragged text").aligned(BLOCK)
    q, k, v = make_qkv(layout, torch.float16, heads=1, dim=128)
    run_and_check(layout, make_map(layout, BLOCK, heads=1), q.abs() + 4, -k.abs() - 4, v, scale=0.5)
