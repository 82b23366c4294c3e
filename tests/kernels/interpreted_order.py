"""Token orders under Triton's interpreter, which must be on before Triton is imported: see interpreter.py.

float16 and float32 only: the interpreter computes bfloat16 wrongly.
"""

import pytest
import torch
from inputs import TRITON, PoisonedEmpty, make_layout, make_map, make_qkv
from norms import FORMS
from orders import GRIDS, check_attend, check_norm, check_reorder

from videosparse.layout import VideoGrid


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.mark.parametrize(("number", "text", "gap"), [(0, 3, 5), (1, 6, 0), (2, 0, 0), (3, 3, 5), (4, 0, 0)])
def test_reorder(number, text, gap):
    check_reorder(GRIDS[number], text, gap, torch.float32, TRITON, batch=1)


@pytest.mark.parametrize("view", ["fused", "head-major"])
@pytest.mark.parametrize(("heads", "dim"), [(6, 16), (1, 10), (7, 80)])
def test_reorder_strides_and_sizes(view, heads, dim):
    check_reorder(GRIDS[4], 2, 1, torch.float16, TRITON, heads=heads, dim=dim, view=view)


@pytest.mark.parametrize("form", FORMS)
def test_norm_rotate(form):
    check_norm(form, torch.float16, TRITON, gap=2, grid=GRIDS[4], heads=5)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (40, 8)])
def test_norm_rotate_heads(heads, dim):
    check_norm("wan", torch.float32, TRITON, batch=1, heads=heads, dim=dim)


@pytest.mark.parametrize(("kind", "sparse"), [("text", False), ("ragged text", True)])
def test_attend(kind, sparse):
    layout = make_layout(kind, grid=VideoGrid(2, 7, 5))
    layout = layout.aligned((64, 64)) if sparse else layout
    block_map = make_map(layout, (64, 64), heads=2) if sparse else None
    check_attend(layout, block_map, *make_qkv(layout, torch.float32, heads=2, dim=16), TRITON)


def test_attend_per_head():
    layout = make_layout("video", grid=VideoGrid(3, 5, 8))
    block_map = make_map(layout, (64, 64), "per head", heads=6)
    check_attend(layout, block_map, *make_qkv(layout, torch.float16, heads=6, dim=16, batch=1), TRITON)
