"""Changed scores of far tokens on a GPU: by the portable kernels, right, the same every time, without a wait."""

import pytest
import torch
from far import check_attend, check_stats, check_sums, order_for, with_far
from inputs import TRITON, make_layout, make_map, make_qkv

from videosparse.kernels import attend
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.logits import FarLogits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GRID = VideoGrid(11, 13, 17)  # 2431 tokens; with six trained frames 663 apart is far


@pytest.mark.parametrize(
    ("kind", "dtype", "dim", "block", "ordered"),
    [
        ("video", torch.bfloat16, 128, None, False),
        ("ragged text", torch.bfloat16, 128, None, True),
        ("ragged text", torch.bfloat16, 128, (128, 128), False),
        ("video", torch.bfloat16, 128, (128, 64), True),
        ("text", torch.float16, 64, (64, 64), False),
        ("ragged text", torch.float32, 96, (128, 64), False),
    ],
)
def test_attend(kind, dtype, dim, block, ordered):
    layout = make_layout(kind, device="cuda", grid=GRID)
    layout = layout if block is None else layout.aligned(block)
    block_map = None if block is None else make_map(layout, block, "per head", heads=3, device="cuda")
    q, k, v = make_qkv(layout, dtype, dim=dim, device="cuda", view="fused")
    check_attend(layout, block_map, q, k, v, TRITON, order=order_for(layout, 3) if ordered else None)


@pytest.mark.parametrize(
    ("kind", "dtype", "block", "sample"),
    [
        ("ragged text", torch.bfloat16, (128, 64), None),
        ("video", torch.float16, (64, 64), None),
        ("ragged text", torch.bfloat16, (128, 64), 16),
        ("video", torch.float32, (128, 128), None),
    ],
)
def test_block_sums(kind, dtype, block, sample):
    layout = make_layout(kind, device="cuda", grid=GRID).aligned(block)
    check_sums(layout, block, dtype, TRITON, sample=sample, dim=64, device="cuda")


@pytest.mark.parametrize("code", [0, 4])
def test_block_stats(code):
    check_stats(GRID, torch.float32, TRITON, code=code, dim=64, device="cuda")


def test_it_waits_for_nothing_and_repeats():
    layout = TokenLayout(GRID)
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128, device="cuda")
    options = with_far(TRITON)
    first = attend(q, k, v, layout=layout, options=options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = attend(q, k, v, layout=layout, options=options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def test_a_long_video_is_right_row_by_row():
    """Wan at 480x832 and twice its length: tiles near, far and between, by rows of fp64."""
    from videosparse.kernels.accuracy import measure

    layout = TokenLayout(VideoGrid(41, 30, 52))
    q, k, v = make_qkv(layout, torch.bfloat16, batch=1, heads=1, dim=128, device="cuda")
    logit = FarLogits(21)
    out, lse = attend(q, k, v, layout=layout, return_lse=True, options=with_far(TRITON, logit))
    rows = torch.tensor([0, 1559, 1560, 16380, 32759, 32760, 40000, layout.length - 1], device="cuda")
    found = measure(out, lse, q, k, v, layout=layout, logit=logit, rows=rows)
    assert found.ok, found
