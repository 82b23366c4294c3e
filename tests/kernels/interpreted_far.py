"""Changed scores of far tokens under Triton's interpreter: see interpreter.py."""

import pytest
import torch
from far import FAR, GRID, check_attend, check_stats, check_sums, order_for, with_far
from inputs import TRITON, PoisonedEmpty, make_layout, make_map, make_qkv

from videosparse.kernels import attend
from videosparse.layout import VideoGrid
from videosparse.logits import FarLogits


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.mark.parametrize("kind", ["video", "ragged text"])
@pytest.mark.parametrize("sparse", [False, True])
def test_layouts(kind, sparse):
    layout = make_layout(kind, grid=GRID)
    layout = layout.aligned((64, 64)) if sparse else layout
    block_map = make_map(layout, (64, 64), heads=1) if sparse else None
    check_attend(layout, block_map, *make_qkv(layout, torch.float16, heads=1, dim=16, batch=2), TRITON)


@pytest.mark.parametrize(("kind", "sparse"), [("video", False), ("ragged text", True)])
def test_orders(kind, sparse):
    layout = make_layout(kind, grid=GRID)
    layout = layout.aligned((64, 64)) if sparse else layout
    block_map = make_map(layout, (64, 64), "per head", heads=3) if sparse else None
    q, k, v = make_qkv(layout, torch.float16, heads=3, dim=16, batch=2 if sparse else 1)
    check_attend(layout, block_map, q, k, v, TRITON, order=order_for(layout, 3))


@pytest.mark.parametrize("block", [(128, 64)])
def test_blocks_and_single_precision(block):
    layout = make_layout("text", grid=VideoGrid(7, 5, 9)).aligned(block)
    block_map = make_map(layout, block, heads=1, density=0.9)  # of half the blocks, now and then none is far
    check_attend(layout, block_map, *make_qkv(layout, torch.float32, heads=1, dim=16), TRITON)


@pytest.mark.parametrize("scale", [0.5, -0.25])
def test_sign_is_that_of_the_scaled_score(scale):
    layout = make_layout("video", grid=GRID)
    check_attend(layout, None, *make_qkv(layout, torch.float16, batch=1, heads=1, dim=16), TRITON, scale=scale)


def test_a_short_video_is_left_alone():
    layout = make_layout("video", grid=GRID)
    q, k, v = make_qkv(layout, torch.float16, batch=1, heads=1, dim=16)
    options = with_far(TRITON, FarLogits(trained=GRID.frames))
    assert torch.equal(attend(q, k, v, layout=layout, options=options), attend(q, k, v, layout=layout, options=TRITON))


def test_rows_that_see_no_key():
    """Frame 0 does not see the last frames, and this map shows it nothing else."""
    layout = make_layout("video", grid=VideoGrid(8, 4, 16))
    block_map = make_map(layout, (64, 64), heads=1)
    block_map.keep[:] = True
    block_map.keep[:, :, 0, : FAR.trained] = False
    check_attend(layout, block_map, *make_qkv(layout, torch.float16, batch=1, heads=1, dim=16), TRITON)


@pytest.mark.parametrize(("block", "sample"), [((64, 64), None), ((128, 128), None), ((128, 64), 16)])
def test_block_sums(block, sample):
    check_sums(make_layout("ragged text", grid=GRID).aligned(block), block, torch.float16, TRITON, sample=sample)


@pytest.mark.parametrize("code", [0, 4])
def test_block_stats(code):
    check_stats(GRID, torch.float16, TRITON, code=code)
