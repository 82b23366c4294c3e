"""Choosing token orders and maps from what attention looks like."""

import pytest
import torch
from inputs import TORCH, make_layout, make_qkv
from stats import probabilities

from videosparse.blocks import PackedIndex
from videosparse.kernels import attend, block_stats, block_sums
from videosparse.kernels.order_search import (
    ORDERS,
    OrderMetric,
    OrderSelection,
    choose,
    coarser,
    figures,
    holdings,
    in_order,
    look,
    search_orders,
)
from videosparse.kernels.selection import Selection, expand
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.ordering import AXIS_ORDERS, TokenOrder

GRID = VideoGrid(7, 6, 9)
BLOCK = (128, 64)


def columns_of_time(grid, heads=2, dim=32, strength=6.0):
    """q, k, v of a video whose tokens look at their own place in every frame."""
    # at right angles: places that happened to be alike would ask for another order
    places = torch.linalg.qr(torch.randn(dim, grid.frame_tokens))[0].T
    q = places.repeat(grid.frames, 1)[None, :, None].expand(1, -1, heads, -1) * strength * dim**0.25
    return q.contiguous(), q.clone(), torch.randn(1, grid.tokens, heads, dim)


def test_in_order_is_what_token_orders_do():
    layout = TokenLayout(GRID)
    x = torch.randn(2, GRID.tokens, 3, 4)
    for code in ORDERS:
        expected = TokenOrder(GRID, (code,) * 3).apply(x, layout)
        assert torch.equal(in_order(x, GRID, code, 1), expected)
        assert torch.equal(in_order(x.permute(0, 2, 1, 3), GRID, code, 2), expected.permute(0, 2, 1, 3))


def test_figures_are_those_of_the_paper():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    q = q * 4
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    sparse, uneven = figures(block_stats(q, k, lse, layout=layout, block=(64, 64)), 0.9)
    p = probabilities(q, k, lse, layout, (64, 64), torch.float64)
    count = (p >= 0).sum((3, 5))
    empty = ((p >= 0) & (p < 1e-3)).sum((3, 5)) / count >= 0.9
    torch.testing.assert_close(sparse, empty.float().mean((2, 3)))
    ratio = p.amax((3, 5)) / (p.clamp(min=0).sum((3, 5)) / count)
    torch.testing.assert_close(uneven.double(), ratio.mean((2, 3)), rtol=1e-4, atol=0)


def test_blocks_of_zeros_are_even():
    layout = make_layout("video")
    q, k, _ = make_qkv(layout, torch.float32, dim=16)
    lse = torch.full((2, 3, layout.length), -torch.inf)
    sparse, uneven = figures(block_stats(q, k, lse, layout=layout, block=(64, 64)), 0.9)
    assert (sparse == 1).all()
    assert (uneven == 1).all()


def test_choice_weighs_both_figures():
    sparse, uneven = torch.rand(6, 50), 1 + 10 * torch.rand(6, 50)
    for alpha in (0.0, 0.3, 1.0):
        dense = 1 - sparse
        cost = alpha * dense / dense.sum(0) + (1 - alpha) * uneven / uneven.sum(0)
        assert torch.equal(choose(sparse, uneven, alpha), cost.argmin(0))
    assert torch.equal(choose(sparse, uneven, 1.0), sparse.argmax(0))


def test_choice_of_equals_is_raster_order_and_nan_is_worst():
    assert (choose(torch.ones(6, 3), torch.ones(6, 3), 0.5) == 0).all()
    uneven = torch.ones(6, 2)
    uneven[0] = torch.nan
    assert (choose(torch.zeros(6, 2), uneven, 0.0) >= 0).all()


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 1.1), ("eps", 0), ("sigma", -1), ("alpha", "x"), ("eps", True), ("by", "rank")]
)
def test_metric_refuses(name, value):
    with pytest.raises(
        (TypeError, ValueError), match=f"{name} must" if name != "by" else "order_by must be metric or mass"
    ):
        OrderMetric(**{name: value})


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_coarser_sums(block):
    layout = TokenLayout(GRID)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    fine, wanted = (block_sums(q, k, lse, layout=layout, block=b) for b in ((64, 64), block))
    torch.testing.assert_close(coarser(fine, block), wanted)


def test_looks_cover_all_heads_in_groups(monkeypatch):
    layout = make_layout("ragged text").aligned(BLOCK)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    whole = list(look(q, k, lse, layout.grid, BLOCK))
    assert len(whole) == 1
    monkeypatch.setattr("videosparse.kernels.order_search._GROUP_BLOCKS", 60)
    parts = list(look(q, k, lse, layout.grid, BLOCK))
    assert len(parts) == 3
    for code in ORDERS:
        for name in ("sparse", "uneven", "sums"):
            joined = torch.cat([getattr(p[code], name) for p in parts], 1)
            assert torch.equal(joined, getattr(whole[0][code], name))
        assert not whole[0][code].sums.isnan().any(), "text and padding are never read"


def read_by_name(grid, name):
    """int64 [tokens], raster tokens in an order of the axes, by sorting: nothing of ours."""
    places = [(f, h, w) for f in range(grid.frames) for h in range(grid.height) for w in range(grid.width)]
    wanted = sorted(range(len(places)), key=lambda t: [places[t]["FHW".index(axis)] for axis in name])
    return torch.tensor(wanted)


def shares_by_definition(q, k, lse, layout, block, count):
    """fp64 [6, B, H]: what the `count` largest blocks of every row hold, from all probabilities at once."""
    video, shares = layout.video, []
    for name in AXIS_ORDERS:
        read = read_by_name(layout.grid, name)
        moved_q, moved_k = (x[:, read].double().transpose(1, 2) for x in (q, k))
        p = (moved_q @ moved_k.mT * q.shape[3] ** -0.5 - lse[:, :, read, None].double()).exp()
        p = torch.nn.functional.pad(p, (0, -video % block[1], 0, -video % block[0]))
        rows, columns = (ceil_div(video, b) for b in block)
        sums = p.view(*p.shape[:2], rows, block[0], columns, block[1]).sum((3, 5))
        shares.append(sums.topk(count, 3).values.sum((2, 3)) / sums.sum((2, 3)))
    return torch.stack(shares)


@pytest.mark.parametrize("kind", ["video", "ragged text"])
@pytest.mark.parametrize("block", [(64, 64), (128, 64)])
def test_what_a_map_holds_in_an_order_is_what_its_definition_says(monkeypatch, kind, block):
    layout = make_layout(kind).aligned(block)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    q = q * 3
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    expected = shares_by_definition(q, k, lse, layout, block, 2)
    for limit in (None, 60):  # all heads at once, and one after another
        if limit:
            monkeypatch.setattr("videosparse.kernels.order_search._GROUP_BLOCKS", limit)
        found = list(holdings(q, k, lse, layout.grid, block, 2))
        assert len(found) == 6 * (3 if limit else 1)
        for one in found:
            torch.testing.assert_close(one.share.double(), expected[one.code][:, one.heads], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["video", "ragged text"])
def test_by_mass_every_head_has_the_order_that_holds_most(kind):
    layout = make_layout(kind).aligned(BLOCK)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    q = q * 3
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    _, codes = searched(q, k, lse, layout, density=0.5, by="mass")
    columns = ceil_div(layout.video, BLOCK[1])
    shares = shares_by_definition(q, k, lse, layout, BLOCK, max(1, round(0.5 * columns))).mean(1)
    assert codes.tolist() == shares.argmax(0).tolist()


def test_by_mass_a_head_without_numbers_stays_in_raster_order():
    layout = TokenLayout(GRID)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    _, codes = searched(q, k, lse, layout, by="mass")
    lse[:, 1] = torch.nan
    _, broken = searched(q, k, lse, layout, by="mass")
    assert broken.tolist() == [int(codes[0]), 0, int(codes[2])]


def searched(q, k, lse, layout, density=0.5, choose=True, codes=None, block=BLOCK, by="metric"):
    samples, heads = q.shape[0], q.shape[2]
    rows, columns = (ceil_div(layout.video, b) for b in block)
    base = max(1, round(density * columns))
    counts = Selection(rows, columns, base, base, base, 1.0)
    shape = (samples, heads, *(ceil_div(layout.length, b) for b in block))
    index = PackedIndex.allocate(layout, block, samples, heads, counts.capacity(shape))
    codes = torch.full((heads,), 99, dtype=torch.int32) if codes is None else codes
    search_orders(q, k, lse, index, codes, OrderSelection(layout.grid, counts, OrderMetric(by=by), choose))
    return index, codes


@pytest.mark.parametrize("by", ["metric", "mass"])
def test_heads_that_look_through_time_read_frames_fastest(by):
    grid = VideoGrid(32, 4, 4)  # a block holds two places; with two rows, those of a column in any order
    layout = TokenLayout(grid)
    q, k, v = columns_of_time(grid)
    dense, lse = attend(q, k, v, layout=layout, return_lse=True)
    _, codes = searched(q, k, lse, layout, density=0.5, by=by)
    assert all(AXIS_ORDERS[c].endswith("F") for c in codes.tolist())
    errors = []
    for chosen in (codes, codes * 0):
        index, _ = searched(q, k, lse, layout, density=0.5, choose=False, codes=chosen)
        order = TokenOrder(grid, tuple(chosen.tolist()))
        moved = (order.apply(x, layout) for x in (q, k, v))
        out = order.restore(attend(*moved, layout=layout, index=expand(index)), layout)
        errors.append((out - dense).norm() / dense.norm())
    assert errors[0] < 0.1 < errors[1]


@pytest.mark.parametrize("kind", ["video", "text", "ragged text"])
@pytest.mark.parametrize("pick", ["metric", "mass", None])
def test_map_keeps_the_largest_blocks_of_every_row_in_the_order(kind, pick):
    layout = make_layout(kind).aligned(BLOCK)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    given = torch.tensor([5, 0, 3], dtype=torch.int32)
    how = {"by": pick} if pick else {"choose": False, "codes": given.clone()}
    index, codes = searched(q, k, lse, layout, **how)
    if not pick:
        assert torch.equal(codes, given)
    order = TokenOrder(layout.grid, tuple(codes.tolist()))
    moved = order.apply(lse[..., None].transpose(1, 2), layout)[..., 0].transpose(1, 2)
    sums = block_sums(order.apply(q, layout), order.apply(k, layout), moved, layout=layout, block=BLOCK, options=TORCH)
    rows, columns = (ceil_div(layout.video, b) for b in BLOCK)
    keep = index.block_map().keep
    assert keep[:, :, rows:].all()
    assert keep[:, :, :, columns:].all()
    count = max(1, round(0.5 * columns))
    kept = keep[:, :, :rows, :columns]
    assert (kept.sum(3) == count).all()
    best = sums[:, :, :rows, :columns].topk(count, 3).values.sum(3)
    torch.testing.assert_close((sums[:, :, :rows, :columns] * kept).sum(3), best)


@pytest.mark.parametrize("by", ["metric", "mass"])
def test_a_search_is_one_node_and_repeats_to_the_bit(by):
    layout = make_layout("text").aligned(BLOCK)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    index, codes = searched(q, k, lse, layout)
    wanted = OrderSelection(layout.grid, Selection(3, 5, 2, 2, 2, 1.0), OrderMetric(by=by))
    eager = torch.zeros_like(codes)
    search_orders(q, k, lse, index, eager, wanted)
    bits, traced = index.bits.clone(), torch.zeros_like(codes)
    index.bits.zero_()

    def run(q, k, lse):
        search_orders(q, k, lse, index, traced, wanted)
        return q + 1

    torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, lse)
    assert torch.equal(traced, eager)
    assert torch.equal(index.bits, bits)
