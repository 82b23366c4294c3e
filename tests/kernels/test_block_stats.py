"""block_stats: sum, largest entry and share of small entries of every block, against the whole matrix."""

import far
import pytest
import torch
from inputs import BLOCKS, LAYOUTS, TORCH, make_layout, make_qkv
from stats import check_stats

from videosparse.kernels import attend, block_stats, block_sums, torch_path
from videosparse.layout import VideoGrid
from videosparse.ordering import SearchedOrder, TokenOrder


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_block_stats_are_exact(kind, block, monkeypatch):
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 60_000)  # several strips of rows
    check_stats(make_layout(kind).aligned(block), block, make_qkv, torch.float32, TORCH, dim=16)


def test_sums_are_those_of_block_sums():
    layout = make_layout("ragged text").aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float32)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    stats = block_stats(q, k, lse, layout=layout, block=(64, 64))
    torch.testing.assert_close(stats.sums, block_sums(q, k, lse, layout=layout, block=(64, 64)))


def test_rows_that_count_nothing_hold_zeros():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    lse[:, :, :64] = -torch.inf
    stats = block_stats(q, k, lse, layout=layout, block=(64, 64))
    assert (stats.sums[:, :, 0] == 0).all()
    assert (stats.peaks[:, :, 0] == 0).all()
    assert (stats.small[:, :, 0] == 1).all()


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_eps_must_be_positive(eps):
    layout = make_layout("video")
    q, k, _ = make_qkv(layout, torch.float32)
    with pytest.raises(ValueError, match="eps must be positive"):
        block_stats(q, k, torch.zeros(2, 3, layout.length), layout=layout, block=(64, 64), eps=eps)


@pytest.mark.parametrize("options", [TORCH, far.with_far(TORCH)])
def test_orders_of_other_heads_grids_and_devices(options):
    layout = make_layout("text")
    q, k, _ = make_qkv(layout, torch.float32)
    lse = torch.zeros(2, 3, layout.length)
    other, codes = VideoGrid(3, 10, 9), torch.zeros(3, dtype=torch.int32, device="meta")
    refused = {
        "TokenOrder is for 2 heads on grid 3x9x10 .got 3 heads": TokenOrder(layout.grid, (0, 1)),
        "TokenOrder is for 3 heads on grid 3x10x9 .got 3 heads on grid 3x9x10": TokenOrder(other, (0, 1, 2)),
        "order's codes must be on cpu": SearchedOrder(layout.grid, codes),
    }
    for message, order in refused.items():
        with pytest.raises(ValueError, match=message):
            block_stats(q, k, lse, layout=layout, block=(64, 64), order=order, options=options)


def test_op_compiles_to_one_node():
    layout = make_layout("text").aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)

    def figures(q, k, lse):
        return block_stats(q, k, lse, layout=layout, block=(64, 64)).peaks

    compiled = torch.compile(figures, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, lse), figures(q, k, lse))
