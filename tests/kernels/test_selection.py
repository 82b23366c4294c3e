"""From block sums to maps and lists: the torch path, the rule for heads, and the ops around them."""

import pytest
import torch
from inputs import make_layout

from videosparse.blocks import PackedIndex
from videosparse.kernels import selection, torch_select
from videosparse.kernels.selection import Selection, head_counts, head_recall
from videosparse.layout import ceil_div

BASE = Selection(video_rows=5, video_cols=11, base=4, low=4, high=4, threshold=0.8)


def expected_keep(sums, counts, video_rows, video_cols):
    """One row after the other, by sorting; NaN last."""
    keep = torch.ones_like(sums, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in sums.shape[:3])).tolist():
        if r < video_rows:
            row = [-1.0 if x != x else x for x in sums[b, h, r].tolist()]
            largest = sorted(range(video_cols), key=lambda c: (-row[c], c))[: int(counts[b, h])]
            keep[b, h, r, :video_cols] = False
            keep[b, h, r, largest] = True
    return keep


@pytest.mark.parametrize("values", ["random", "tied", "zeros", "with NaN"])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("text", [(0, 0), (2, 0), (0, 1), (2, 3)])
def test_the_largest_are_kept(values, columns, text, monkeypatch):
    monkeypatch.setattr(torch_select, "_SLAB", 40)  # a few rows at a time
    video_rows = 5
    sums = torch.rand(2, 3, video_rows + text[0], columns + text[1])
    if values == "tied":
        sums = (sums * 3).floor()
    elif values == "zeros":
        sums = torch.zeros_like(sums)
    elif values == "with NaN":
        sums[sums < 0.3] = float("nan")
    counts = torch.randint(1, columns + 1, (2, 3), dtype=torch.int32)
    bits = torch.full((2, 3, video_rows + text[0], ceil_div(columns + text[1], 8)), 255, dtype=torch.uint8)
    kept = torch_select.keep_largest(sums, counts, bits, video_rows, columns)
    keep = expected_keep(sums, counts, video_rows, columns)
    unused = -(columns + text[1]) % 8
    padded = torch.nn.functional.pad(keep, (0, unused)).unflatten(3, (-1, 8))
    assert torch.equal(bits, (padded * 2 ** torch.arange(8)).sum(4).to(torch.uint8))
    torch.testing.assert_close(kept, torch.where(keep, sums, 0).sum(3), equal_nan=True)


def packed(sums, chosen, grid_layout=None):
    batch, heads, rows, columns = sums.shape
    layout = make_layout("video", grid=type(make_layout("video").grid)(1, rows, 64))
    index = PackedIndex.allocate(layout, (64, 64), batch, heads, chosen.capacity(tuple(sums.shape)))
    shape = (batch, heads, rows, columns)
    bits = torch.zeros(*shape[:3], ceil_div(columns, 8), dtype=torch.uint8)
    return PackedIndex(bits, index.row_ptr, index.order, index.capacity, shape, (64, 64), rows * 64, columns * 64)


@pytest.mark.parametrize("text", [(0, 0), (2, 3)])
def test_lists_are_those_of_the_map(text):
    sums = torch.rand(2, 3, 5 + text[0], 11 + text[1])
    index = packed(sums, BASE)
    selection.select(sums, index, BASE)
    lists, expected = selection.expand(index), index.block_map().index()
    total = int(expected.row_ptr[-1])
    assert torch.equal(lists.row_ptr, expected.row_ptr)
    assert torch.equal(lists.ids[:total], expected.ids)
    assert torch.equal(lists.order, expected.order)
    assert total == lists.ids.numel() == index.capacity
    assert torch.equal(index.block_map().keep, expected_keep(sums, torch.full((2, 3), 4), 5, 11))


def test_equal_inputs_give_equal_bits():
    sums = torch.rand(2, 4, 7, 14)
    chosen = Selection(5, 11, 4, 2, 6, 0.1)
    first, second = packed(sums, chosen), packed(sums, chosen)
    for index in (first, second, second):
        selection.select(sums, index, chosen)
    for name in ("bits", "row_ptr", "order"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("recall", "threshold", "expected"),
    [
        ([0.9, 0.5, 0.95, 0.6], 0.8, [2, 6, 2, 6]),
        ([0.9, 0.5, 0.95, 0.6], 0.92, [4, 6, 2, 4]),
        ([0.9, 0.5, 0.95, 0.6], 0.99, [4, 4, 4, 4]),
        ([0.9, 0.9, 0.9, 0.9], 0.8, [2, 2, 6, 6]),  # ties: the lower head gives, and none gets both
        ([0.9, 0.9, 0.9, 0.9, 0.9], 0.8, [2, 2, 6, 6, 4]),
        ([0.9, 0.85, 0.85, 0.9, 0.1], 0.8, [2, 6, 4, 2, 6]),
        ([0.8, 0.8], 0.8, [4, 4]),  # above, not at
        ([1.0], 0.8, [4]),
        ([0.0, 0.0, 0.9], 0.8, [6, 4, 2]),
    ],
)
def test_which_heads_give_and_which_get(recall, threshold, expected):
    counts = head_counts(torch.tensor([recall, recall]), 4, 2, 6, threshold)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [expected, expected]


def test_samples_have_heads_of_their_own():
    recall = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.9]])
    assert head_counts(recall, 4, 2, 6, 0.8).tolist() == [[2, 6, 4], [6, 4, 2]]


def test_recall_is_that_of_video_rows_with_text():
    sums = torch.rand(1, 2, 4, 6)
    kept = sums[..., 2:].sum(3)
    kept[:, :, 3] = 100.0  # a text row
    expected = sums[:, :, :3, 2:].sum((2, 3)) / sums[:, :, :3].sum((2, 3))
    torch.testing.assert_close(head_recall(sums, kept, 3), expected)
    assert head_recall(torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4), 3).tolist() == [[0.0, 0.0]]
    assert head_recall(torch.full((1, 1, 2, 2), torch.nan), torch.ones(1, 1, 2), 2).item() == 0.0


def test_the_ops_are_well_formed():
    sums = torch.rand(2, 4, 7, 14)
    chosen = Selection(5, 11, 4, 2, 6, 0.1)
    index = packed(sums, chosen)
    buffers = (index.bits, index.row_ptr, index.order)
    torch.library.opcheck(selection.select_blocks, (sums, *buffers, 5, 11, 4, 2, 6, 0.1, "torch"))
    selection.select(sums, index, chosen)
    # what lies beyond the end of the lists is undefined: a full capacity leaves nothing there
    total = int(index.row_ptr[-1])
    torch.library.opcheck(selection.expand_blocks, (index.bits, index.row_ptr, total, 14, "torch"))


def test_a_refresh_compiles_to_one_graph():
    """The op writes the buffers that the lists are then expanded from."""
    chosen = Selection(5, 11, 4, 2, 6, 0.1)

    def refresh(sums, index):
        selection.select(sums, index, chosen)
        lists = selection.expand(index)
        return lists.ids * 1, lists.row_ptr * 1

    torch._dynamo.reset()
    compiled = torch.compile(refresh, backend="aot_eager", fullgraph=True)
    sums = torch.rand(2, 4, 7, 14)
    ours, eager = packed(sums, chosen), packed(sums, chosen)
    for found, expected in zip(compiled(sums, ours), refresh(sums, eager), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(ours.bits, eager.bits)


def test_sums_that_do_not_fit():
    index = packed(torch.rand(2, 3, 7, 14), BASE)
    with pytest.raises(ValueError, match=r"sums must be float32 \[2, 3, 7, 14\].*got torch\.float32 \[2, 3, 7, 13\]"):
        selection.select(torch.rand(2, 3, 7, 13), index, BASE)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        selection.select(torch.rand(2, 3, 7, 14).double(), index, BASE)
