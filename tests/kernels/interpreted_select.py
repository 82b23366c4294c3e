"""The kernels of the search under Triton's interpreter, which must be on before Triton is imported.

See interpreter.py. float16 and float32 only: the interpreter computes bfloat16 wrongly.
"""

import pytest
import torch
from inputs import BLOCKS, LAYOUTS, TORCH, PoisonedEmpty, make_layout, make_qkv
from selections import (
    KINDS,
    assert_expands,
    assert_sampled,
    assert_selects,
    call_of,
    keep_by_sorting,
    make_sums,
    packed,
    row_ptr_of,
)

from videosparse.blocks import SELECTION_LIMIT
from videosparse.kernels import attend, torch_select, triton_sampled, triton_select, triton_sums
from videosparse.layout import TokenLayout, VideoGrid

SMALL = VideoGrid(2, 7, 10)
SHAPES = [  # (B, H, M, N), video rows, video columns
    ((1, 1, 1, 1), 1, 1), ((1, 2, 2, 7), 2, 7), ((2, 2, 3, 8), 2, 6), ((2, 1, 2, 9), 2, 8), ((2, 2, 3, 131), 2, 127),
    ((1, 2, 2, 591), 2, 591),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


def counts_for(shape, video_cols):
    """int32 [B, H], another for each head, the bounds among them."""
    counts = torch.randint(1, video_cols + 1, shape[:2], dtype=torch.int32)
    counts[0, 0], counts[-1, -1] = 1, video_cols
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "video_rows", "video_cols"), SHAPES)
def test_selection_equals_sorting(kind, shape, video_rows, video_cols):
    sums = make_sums(kind, shape)
    assert_selects(triton_select, sums, counts_for(shape, video_cols), video_rows, video_cols)


@pytest.mark.parametrize("columns", [7200, 16384])
def test_long_rows(columns):
    for kind in ("random", "few values"):
        sums = make_sums(kind, (1, 2, 2, columns))
        counts = torch.tensor([[columns // 5, columns - 100]], dtype=torch.int32)
        assert_expands(triton_select, assert_selects(triton_select, sums, counts, 1, columns - 4))


def test_every_count():
    sums = make_sums("few values", (1, 1, 1, 19))
    for count in range(1, 18):
        assert_selects(triton_select, sums, torch.tensor([[count]], dtype=torch.int32), 1, 17)


def test_ties_keep_the_first_columns():
    sums = torch.tensor([3.0, 1, 2, 2, 5, 2, 1, 2]).view(1, 1, 1, 8)
    bits = torch.empty.empty(1, 1, 1, 1, dtype=torch.uint8)
    kept = triton_select.keep_largest(sums, torch.tensor([[4]], dtype=torch.int32), bits, 1, 8)
    assert bits.item() == 0b00011101
    assert kept.item() == 12.0


def test_negative_numbers_count_as_zero():
    sums = torch.tensor([-0.0, -7.0, 0.0, torch.nan, 1.0, -torch.nan]).view(1, 1, 1, 6)
    bits = torch.empty.empty(1, 1, 1, 1, dtype=torch.uint8)
    for count, expected in ((1, 0b010000), (2, 0b010001), (3, 0b010011), (4, 0b010111), (5, 0b011111)):
        triton_select.keep_largest(sums, torch.tensor([[count]], dtype=torch.int32), bits, 1, 6)
        assert bits.item() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_torch_selects_the_same_bits(kind):
    sums = make_sums(kind, (2, 2, 3, 75)) - (0.1 if kind == "random" else 0.0)
    counts = counts_for(sums.shape, 70)
    bits, same = (torch.zeros(2, 2, 3, 10, dtype=torch.uint8) for _ in range(2))
    kept = triton_select.keep_largest(sums, counts, bits, 2, 70)
    torch.testing.assert_close(kept, torch_select.keep_largest(sums, counts, same, 2, 70), equal_nan=True)
    assert torch.equal(bits, same)


def test_no_rows():
    sums = torch.zeros(1, 2, 0, 8)
    kept = triton_select.keep_largest(
        sums, torch.ones(1, 2, dtype=torch.int32), torch.zeros(1, 2, 0, 1, dtype=torch.uint8), 0, 8
    )
    assert kept.shape == (1, 2, 0)


def test_rows_too_long_are_refused():
    sums = torch.zeros(1, 1, 1, SELECTION_LIMIT + 1)
    with pytest.raises(ValueError, match=r"at most 16384 \(got 16385\); use larger blocks"):
        triton_select.keep_largest(sums, torch.ones(1, 1).int(), torch.zeros(1, 1, 1, 2049).byte(), 1, 5)


@pytest.mark.parametrize("columns", [1, 8, 31, 591])
@pytest.mark.parametrize("fewest", [2**15, 31])
def test_lists(columns, fewest, monkeypatch):
    monkeypatch.setattr("videosparse.blocks.SHORT_IDS", fewest)
    keep = torch.rand(2, 2, 3, columns) < 0.4
    keep[0, 1] = False
    keep[1, 0] = True
    assert_expands(triton_select, keep)


def test_lists_stay_within_their_rows():
    """Whatever row_ptr says: rows that hold more blocks than their part of the lists are cut."""
    keep = keep_by_sorting(torch.rand(1, 1, 3, 40), torch.full((1, 1), 9), 3, 40)
    row_ptr = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    storage = torch.full((20,), -1, dtype=torch.int32)
    triton_select.expand_kernel[(3,)](packed(keep), row_ptr, storage, 11, 40, PAD=64)
    first, _, last = (row.nonzero()[:, 0].int() for row in keep[0, 0])
    assert torch.equal(storage[:5], first[:5])
    assert torch.equal(storage[5:11], last[:6])
    assert (storage[11:] == -1).all()


def check_sampled(layout, block, sample, dtype, dim, *, heads=4, view="contiguous", scale=None):
    q, k, v = make_qkv(layout, dtype, heads=heads, dim=dim, view=view)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TORCH, scale=scale)
    found = triton_sampled.block_sums(q, k, lse, call_of(layout, dim, scale), block, sample)
    assert_sampled(found, q, k, lse, layout, block, sample, scale)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_sampled_layouts(kind, aligned):
    layout = make_layout(kind, grid=SMALL)
    check_sampled(layout.aligned((64, 64)) if aligned else layout, (64, 64), 16, torch.float32, 16)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sample", [8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sampled_blocks(block, sample, dtype):
    check_sampled(make_layout("ragged text", grid=SMALL), block, sample, dtype, 12, view="fused", scale=0.4)


def test_sampled_tiles_of_many_blocks():
    """Two tiles of blocks, the second one not full."""
    check_sampled(TokenLayout(VideoGrid(1, 5, 122)), (64, 64), 16, torch.float16, 16)


def test_all_rows_are_the_exact_sums():
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TORCH)
    call = call_of(layout, 16)
    exact = triton_sums.block_sums(q, k, lse, call, (64, 64))
    torch.testing.assert_close(triton_sampled.block_sums(q, k, lse, call, (64, 64), 64), exact)


@pytest.mark.parametrize("level", [torch.inf, -torch.inf])
def test_rows_without_a_level_count_nothing(level):
    layout = TokenLayout(SMALL)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TORCH)
    lse[:, :, 64:128] = level
    sums = triton_sampled.block_sums(q, k, lse, call_of(layout, 16), (64, 64), 8)
    assert (sums[:, :, 1] == 0).all()
    assert (sums[:, :, 0] > 0).all()


@pytest.mark.parametrize("dimension", ["sample", "token", "head"])
def test_sampled_offsets_beyond_32_bits(dimension):
    """Strides below 2^31 whose last multiple is above; only the touched pages of the storage exist."""
    layout, batch, heads, dim = TokenLayout(VideoGrid(1, 1, 70)), 3, 3, 16
    strides = {
        "sample": (2**30 + 64, heads * dim, dim, 1),
        "token": (heads * dim, 2**25 + 64, dim, 1),
        "head": (70 * dim, dim, 2**30 + 64, 1),
    }[dimension]
    size = 1 + sum((n - 1) * s for n, s in zip((batch, 70, heads, dim), strides, strict=True))
    assert size > 2**31
    storage = torch.empty.empty(size + 2 * 8192, dtype=torch.float16)
    q, k, v = make_qkv(layout, torch.float16, batch=batch, heads=heads, dim=dim)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TORCH)
    far = [storage.as_strided(x.shape, strides, i * 8192).copy_(x) for i, x in enumerate((q, k))]
    found, near = (triton_sampled.block_sums(*x, lse, call_of(layout, dim), (64, 64), 16) for x in (far, (q, k)))
    assert torch.equal(found, near)


@pytest.mark.parametrize("sample", [0, 3, 24, 128])
def test_sample_must_fit(sample):
    layout = TokenLayout(VideoGrid(1, 1, 70))
    q, k, _ = make_qkv(layout, torch.float16, dim=16)
    lse = torch.zeros(2, 3, 70)
    with pytest.raises(ValueError, match=rf"sample must be a power of two .* \(got {sample}\)"):
        triton_sampled.block_sums(q, k, lse, call_of(layout, 16), (128, 64), sample)


def test_lists_of_a_selection_are_those_of_its_map():
    sums = make_sums("random", (2, 2, 3, 77))
    counts = counts_for(sums.shape, 70)
    bits = torch.zeros(2, 2, 3, 10, dtype=torch.uint8)
    triton_select.keep_largest(sums, counts, bits, 2, 70)
    keep = keep_by_sorting(sums, counts, 2, 70)
    ids = triton_select.expand(bits, row_ptr_of(keep), int(keep.sum()), 77)
    assert torch.equal(ids.long(), keep.nonzero()[:, 3])
