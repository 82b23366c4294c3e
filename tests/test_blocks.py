from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from videosparse.blocks import BlockMap, PackedIndex, id_dtype, pack_rows, unpack_rows, work_order
from videosparse.layout import TokenLayout, VideoGrid


def random_map(b=2, h=3, rows=5, cols=9, block=(128, 64)):
    keep = torch.rand(b, h, rows, cols) > 0.6
    keep[0, 0, 2] = False
    return BlockMap(keep, block, rows * block[0] - 5, cols * block[1] - 63)


def rows_of(index):
    pointers = index.row_ptr.tolist()
    return [index.ids[a:b].tolist() for a, b in pairwise(pointers)]


def test_index_lists_the_kept_blocks_in_order():
    block_map = random_map()
    index = block_map.index()
    expected = [row.nonzero().flatten().tolist() for row in block_map.keep.flatten(0, 2)]
    assert rows_of(index) == expected
    *order, long = index.order.tolist()
    assert sorted(order) == list(range(len(expected)))
    counts = [len(expected[row]) for row in order]
    assert all(count * len(counts) > 2 * sum(counts) for count in counts[:long])
    assert counts[long:] == sorted(counts[long:], reverse=True)


def test_long_rows_start_first_and_short_ones_last(monkeypatch):
    monkeypatch.setattr("videosparse.blocks._LAST_ROWS", 4)
    # the mean is 5: rows 2, 7 and 11 are long, row 7 by more than four times
    counts = torch.tensor([1, 3, 15, 2, 1, 0, 4, 25, 2, 3, 1, 11, 2])
    assert counts.float().mean() < 5.5
    *order, long = work_order(counts).tolist()
    assert long == 3
    assert order[:3] == [7, 2, 11]
    assert order[3:9] == [0, 1, 3, 4, 5, 6]  # as numbered
    assert order[9:] == [9, 8, 12, 10]  # the last four, longest first


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [7], [5, 5, 5], [0, 0, 9]])
def test_every_row_has_a_place_in_the_order(counts):
    *order, long = work_order(torch.tensor(counts, dtype=torch.int64)).tolist()
    assert sorted(order) == list(range(len(counts)))
    assert long == sum(3 * count > 2 * sum(counts) for count in counts if len(counts) == 3)


def test_index_with_a_capacity_holds_the_same_rows():
    block_map = random_map()
    index = block_map.index(capacity=2 * 3 * 5 * 9)
    assert index.ids.numel() == 270
    assert rows_of(index) == rows_of(block_map.index())


def test_index_refuses_a_capacity_that_is_too_small():
    with pytest.raises(ValueError, match="more than the capacity of 3"):
        random_map().index(capacity=3)


def test_index_limits(monkeypatch):
    monkeypatch.setattr("videosparse.blocks.INDEX_LIMIT", 40)
    with pytest.raises(ValueError, match="an index holds at most 40; use larger blocks"):
        random_map().index()
    with pytest.raises(ValueError, match="at most 40 rows and entries"):
        random_map().index(capacity=41)


def test_lists_do_not_depend_on_the_slabs_they_are_made_from(monkeypatch):
    block_map = random_map()
    whole = block_map.index()
    monkeypatch.setattr("videosparse.blocks._SLAB", 20)
    assert torch.equal(block_map.index().ids, whole.ids)


def test_a_shared_map_is_indexed_once():
    assert random_map(b=1, h=1).index().shape == (1, 1, 5, 9)
    assert random_map(b=1, h=1).index().row_ptr.numel() == 6


def test_transpose_is_the_key_major_map():
    block_map = random_map()
    turned = block_map.transpose()
    assert turned.block == (64, 128)
    assert (turned.q_len, turned.kv_len) == (block_map.kv_len, block_map.q_len)
    assert torch.equal(turned.to_tokens(), block_map.to_tokens().transpose(2, 3))


@pytest.mark.parametrize("spare", [0, 70])
def test_key_major_lists_are_those_of_the_transposed_map(spare):
    block_map = random_map()
    total = int(block_map.keep.sum())
    index = block_map.index(capacity=total + spare)
    index.ids[total:] = 7  # undefined
    turned, expected = index.transpose(), block_map.transpose().index()
    assert rows_of(turned) == rows_of(expected)
    assert torch.equal(turned.row_ptr, expected.row_ptr)
    assert torch.equal(turned.order, expected.order)
    assert (turned.row_ptr.dtype, turned.ids.dtype, turned.order.dtype) == (torch.int32, torch.int16, torch.int32)
    assert (turned.shape, turned.block, turned.q_len, turned.kv_len) == (
        expected.shape, expected.block, expected.q_len, expected.kv_len,
    )  # fmt: skip
    assert rows_of(turned.transpose()) == rows_of(index)


def test_key_major_lists_of_an_empty_map():
    block_map = random_map()
    index = BlockMap(block_map.keep & False, block_map.block, block_map.q_len, block_map.kv_len).index()
    assert not index.transpose().row_ptr.any()


def test_key_major_lists_are_built_once_and_stay_with_their_lists():
    index = random_map().index()
    assert index.key_major is None
    size = index.bytes
    index.prepare_backward()
    turned = index.key_major
    index.prepare_backward()
    assert index.key_major is turned
    assert index.bytes == size + turned.bytes
    assert replace(index, ids=index.ids.clone()).key_major is None


def test_ids_are_int16_below_32768_columns():
    assert id_dtype(1) == id_dtype(32_767) == torch.int16
    assert id_dtype(32_768) == torch.int32
    keep = torch.zeros(1, 1, 1, 32_767, dtype=torch.bool)
    keep[..., ::1000] = keep[..., -1] = True
    index = BlockMap(keep, (64, 64), 1, 32_767 * 64).index()
    assert index.ids.dtype == torch.int16
    assert rows_of(index) == [[*range(0, 32_767, 1000), 32_766]]


@pytest.mark.parametrize(
    ("fewest", "ids", "turned"),
    [(5, torch.int32, torch.int32), (6, torch.int32, torch.int16), (9, torch.int32, torch.int16),
     (10, torch.int16, torch.int16)],
)  # fmt: skip
def test_rows_and_columns_decide_on_their_ids_by_themselves(monkeypatch, fewest, ids, turned):
    block_map = random_map(rows=5, cols=9)
    expected = rows_of(block_map.index())
    monkeypatch.setattr("videosparse.blocks.SHORT_IDS", fewest)
    index = block_map.index()
    index.prepare_backward()
    assert (index.ids.dtype, index.key_major.ids.dtype, index.transpose().transpose().ids.dtype) == (ids, turned, ids)
    assert rows_of(index) == expected
    assert rows_of(index.key_major) == rows_of(block_map.transpose().index())
    size = index.ids.numel() * index.ids.element_size() + index.row_ptr.numel() * 8
    assert index.bytes - index.key_major.bytes == size


def test_a_transposed_map_may_not_fit(monkeypatch):
    index = random_map(rows=5, cols=9).index()
    monkeypatch.setattr("videosparse.blocks.INDEX_LIMIT", 50)
    with pytest.raises(ValueError, match="map of 54 rows does not fit an index; use larger blocks"):
        index.transpose()


def test_densities():
    layout = TokenLayout(VideoGrid(2, 8, 16), text=64)
    keep = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    keep[..., :4, :4] = torch.eye(4, dtype=torch.bool)
    block_map = BlockMap(keep, (64, 64), layout.length, layout.length)
    assert block_map.density == pytest.approx(13 / 25)
    assert block_map.video_density(layout) == pytest.approx(0.25)
    assert BlockMap.full(layout, (64, 64)).density == 1


def test_prints_itself_as_a_picture_and_saves_a_png(tmp_path):
    from PIL import Image

    keep = torch.eye(40, dtype=torch.bool)[None, None]
    block_map = BlockMap(keep, (64, 64), 40 * 64, 40 * 64)
    head, *picture = str(block_map).splitlines()
    assert head == "BlockMap 40 x 40 blocks of 64 x 64, all samples, all heads, density 0.025"
    assert len(picture) == 20
    assert all(len(line) == 40 for line in picture)
    assert picture[0][0] != " "
    assert picture[0][-1] == " "
    block_map.save_png(tmp_path / "map.png", size=80)
    image = Image.open(tmp_path / "map.png")
    assert image.size == (80, 80)
    assert image.getpixel((0, 0)) < 64
    assert image.getpixel((79, 0)) == 255
    block_map.save_png(tmp_path / "small.png", size=20)
    assert Image.open(tmp_path / "small.png").size == (20, 20)


@pytest.mark.parametrize(
    ("keep", "block", "error", "message"),
    [
        (torch.ones(1, 1, 2, 2), (64, 64), TypeError, "must be bool"),
        (torch.ones(1, 1, 2, 3, dtype=torch.bool), (64, 64), ValueError, r"\[B, H, 2, 2\]"),
        (torch.ones(2, 2, dtype=torch.bool), (64, 64), ValueError, r"\[B, H, 2, 2\]"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), (64, 32), ValueError, "each 64 or 128"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), (64.0, 64), ValueError, "each 64 or 128"),
        (torch.ones(1, 0, 2, 2, dtype=torch.bool), (64, 64), ValueError, r"1 sample and 1 head \(got \[1, 0, 2, 2\]\)"),
        (torch.ones(0, 1, 2, 2, dtype=torch.bool), (64, 64), ValueError, r"1 sample and 1 head \(got \[0, 1, 2, 2\]\)"),
        ([[True]], (64, 64), TypeError, r"must be a tensor of bool \[B, H, Mq, Nk\] \(got list\)"),
    ],
)
def test_refuses_what_does_not_fit(keep, block, error, message):
    with pytest.raises(error, match=message):
        BlockMap(keep, block, 128, 100)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ((0, 100), ValueError, r"BlockMap.q_len must be at least 1 \(got 0\)"),
        ((128, -100), ValueError, r"BlockMap.kv_len must be at least 1 \(got -100\)"),
        ((128.0, 100), TypeError, r"BlockMap.q_len must be an int \(got float 128.0\)"),
    ],
)
def test_refuses_lengths_that_are_none(lengths, error, message):
    rows, cols = (int(n) // 64 for n in (lengths[0] + 63, lengths[1] + 63))
    with pytest.raises(error, match=message):
        BlockMap(torch.ones(1, 1, max(0, rows), max(0, cols), dtype=torch.bool), (64, 64), *lengths)


@pytest.mark.parametrize("capacity", [None, 400])
def test_lists_made_in_inference_mode_are_plain_tensors(capacity):
    """Only those have a version, by which caches see that a list has changed."""
    with torch.inference_mode():
        index = random_map().index(capacity)
        index.prepare_backward()
    lists = [getattr(x, name) for x in (index, index.key_major) for name in ("row_ptr", "ids", "order")]
    assert not any(x.is_inference() for x in lists)
    before = index.ids._version
    index.ids.zero_()
    assert index.ids._version > before


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31])
def test_packed_rows_start_on_a_byte(columns):
    keep = torch.rand(2, 3, columns) > 0.5
    bits = pack_rows(keep)
    assert bits.shape == (2, 3, -(-columns // 8))
    assert torch.equal(unpack_rows(bits, columns), keep)
    assert [bits[1, 2, 0].item() >> i & 1 for i in range(min(8, columns))] == keep[1, 2, :8].int().tolist()
    assert unpack_rows(bits, bits.shape[2] * 8)[..., columns:].sum() == 0


def test_a_packed_index_has_buffers_of_fixed_size():
    layout = TokenLayout(VideoGrid(3, 9, 10), text=40).aligned((128, 64))
    index = PackedIndex.allocate(layout, (128, 64), 2, 3, 50)
    assert index.shape == (2, 3, 4, 7)
    assert index.bits.shape == (2, 3, 4, 1)
    assert index.row_ptr.shape == index.order.shape == (25,)
    assert index.bytes == 24 + 2 * 25 * 4
    assert not index.block_map().keep.any()
    other = index.to("cpu")
    other.bits.fill_(5)
    other.row_ptr.fill_(7)
    assert not index.bits.any(), "a copy"
    index.copy_(other)
    assert (index.bits == 5).all()
    assert (index.row_ptr == 7).all()
    assert index.block_map().density == pytest.approx(2 / 7)


def test_a_packed_index_that_is_too_large():
    layout = TokenLayout(VideoGrid(3, 9, 10))
    with pytest.raises(ValueError, match=r"at most 2147483647 rows and entries .*lower density, larger blocks"):
        PackedIndex.allocate(layout, (128, 64), 1, 1, 2**31)
