"""The kernel of block statistics under Triton's interpreter: see interpreter.py."""

import pytest
import torch
from inputs import BLOCKS, LAYOUTS, TRITON, PoisonedEmpty, make_layout, make_qkv
from stats import check_stats

from videosparse.layout import VideoGrid

SMALL = VideoGrid(2, 7, 10)


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_layouts(kind, aligned):
    layout = make_layout(kind, grid=SMALL)
    layout = layout.aligned((64, 64)) if aligned else layout
    check_stats(layout, (64, 64), make_qkv, torch.float32, TRITON, heads=1, dim=16)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blocks_and_strides(block, dtype):
    layout = make_layout("ragged text", grid=SMALL)
    check_stats(layout, block, make_qkv, dtype, TRITON, heads=2, dim=12, view="fused", scale=0.4)
