"""Block statistics and the search for token orders on a GPU: right, without a wait, and the same every time."""

import pytest
import torch
from inputs import TORCH, TRITON, make_layout, make_qkv
from stats import check_stats

from videosparse.blocks import PackedIndex
from videosparse.kernels import attend
from videosparse.kernels.order_search import OrderMetric, OrderSelection, holdings, search_orders
from videosparse.kernels.selection import Selection
from videosparse.layout import TokenLayout, VideoGrid, ceil_div

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("kind", ["video", "ragged text", "no text at all"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 96)])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)])
def test_block_stats(kind, dtype, dim, block):
    layout = make_layout(kind, device="cuda", grid=VideoGrid(5, 13, 17)).aligned(block)
    check_stats(layout, block, make_qkv, dtype, TRITON, dim=dim, device="cuda", view="fused")


@pytest.mark.parametrize("by", ["metric", "mass"])
def test_a_search_waits_for_nothing_and_repeats(by):
    layout, heads, block = TokenLayout(VideoGrid(9, 20, 24)), 4, (128, 64)
    q, k, v = make_qkv(layout, torch.bfloat16, batch=2, heads=heads, dim=64, device="cuda")
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    rows, columns = (ceil_div(layout.video, b) for b in block)
    counts = Selection(rows, columns, 9, 9, 9, 1.0)
    index = PackedIndex.allocate(layout, block, 2, heads, counts.capacity((2, heads, rows, columns)), "cuda")
    codes = torch.zeros(heads, dtype=torch.int32, device="cuda")
    wanted = OrderSelection(layout.grid, counts, OrderMetric(by=by))
    search_orders(q, k, lse, index, codes, wanted)
    before = codes.clone(), index.bits.clone(), index.row_ptr.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        search_orders(q, k, lse, index, codes, wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(before, (codes, index.bits, index.row_ptr), strict=True))
    assert (index.block_map().keep.sum(3) == 9).all()


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 96)])
def test_what_a_map_holds_is_what_torch_finds(dtype, dim, block):
    layout = TokenLayout(VideoGrid(7, 13, 17))
    q, k, v = make_qkv(layout, dtype, batch=2, heads=3, dim=dim, device="cuda")
    q = q * 3
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    call = (q, k, lse, layout.grid, block, 5)
    for ours, plain in zip(holdings(*call, options=TRITON), holdings(*call, options=TORCH), strict=True):
        assert (ours.heads, ours.code) == (plain.heads, plain.code)
        torch.testing.assert_close(ours.share, plain.share, rtol=1e-3, atol=0)
