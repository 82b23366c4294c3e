"""The kernels of the search on a GPU: the map that sorting gives, sums of some rows, 64-bit offsets, no syncs."""

import pytest
import torch
from inputs import BLOCKS, LAYOUTS, TRITON, PoisonedEmpty, make_layout, make_qkv
from selections import (
    KINDS,
    assert_expands,
    assert_sampled,
    assert_selects,
    call_of,
    keep_by_sorting,
    make_sums,
    packed,
)

from videosparse.kernels import attend, block_sums
from videosparse.layout import TokenLayout, VideoGrid, ceil_div

triton_select = pytest.importorskip("videosparse.kernels.triton_select")
from videosparse.kernels import triton_sampled  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

MIDDLE = VideoGrid(5, 13, 17)
SHAPES = [  # (B, H, M, N), video rows, video columns; the blocks of real models among them
    ((1, 1, 1, 1), 1, 1), ((2, 3, 4, 7), 3, 6), ((2, 2, 5, 131), 4, 127), ((1, 3, 40, 591), 40, 591),
    ((1, 2, 50, 1182), 50, 1182), ((1, 2, 20, 1861), 18, 1857), ((1, 2, 9, 3000), 9, 2999),
    ((1, 2, 6, 7200), 6, 7196), ((1, 1, 4, 16384), 3, 16380),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


def counts_for(shape, video_cols):
    counts = torch.randint(1, video_cols + 1, shape[:2], dtype=torch.int32, device="cuda")
    counts[0, 0], counts[-1, -1] = 1, video_cols
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "video_rows", "video_cols"), SHAPES)
def test_selection_equals_sorting(kind, shape, video_rows, video_cols):
    sums = make_sums(kind, shape, "cuda")
    keep = assert_selects(triton_select, sums, counts_for(shape, video_cols), video_rows, video_cols)
    assert_expands(triton_select, keep)


def test_lists_of_empty_rows():
    keep = torch.rand(2, 2, 30, 1182, device="cuda") < 0.3
    keep[:, :, [0, 7, 29]] = False
    assert_expands(triton_select, keep)


def test_offsets_beyond_32_bits():
    rows, columns = 140_000, 16_000
    assert rows * columns > 2**31
    sums = torch.rand(1, 1, rows, columns, device="cuda")
    counts = torch.full((1, 1), 77, dtype=torch.int32, device="cuda")
    bits = torch.full((1, 1, rows, columns // 8), 255, dtype=torch.uint8, device="cuda")
    triton_select.keep_largest(sums, counts, bits, rows, columns)
    for part in (slice(0, 20), slice(rows - 20, rows)):
        assert torch.equal(bits[:, :, part], packed(keep_by_sorting(sums[:, :, part], counts, 20, columns)))


def test_lists_of_the_largest_capacity():
    """A row that straddles the last entry that int32 can number is cut, and rows beyond it write nothing."""
    rows, columns, most = 140_000, 16_000, 2**31 - 1
    bits = torch.full((1, 1, rows, columns // 8), 255, dtype=torch.uint8, device="cuda")
    row_ptr = (torch.arange(rows + 1, device="cuda") * columns).clamp(max=most).int()
    ids = triton_select.expand(bits, row_ptr, most, columns)
    whole = torch.arange(columns, dtype=torch.int16, device="cuda")
    assert torch.equal(ids[134_000 * columns : 134_001 * columns], whole)
    assert torch.equal(ids[most // columns * columns :], whole[: most % columns])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("aligned", [False, True])
def test_sampled_sums(kind, block, aligned):
    layout = make_layout(kind, "cuda", MIDDLE)
    layout = layout.aligned(block) if aligned else layout
    for dtype, dim, sample in (
        (torch.bfloat16, 128, 16), (torch.bfloat16, 128, 8), (torch.float16, 64, 8), (torch.bfloat16, 80, 64),
        (torch.float32, 64, 32), (torch.float32, 128, 16),
    ):  # fmt: skip
        q, k, v = make_qkv(layout, dtype, dim=dim, device="cuda", view="fused")
        _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TRITON)
        found, again = (triton_sampled.block_sums(q, k, lse, call_of(layout, dim), block, sample) for _ in range(2))
        assert torch.equal(found, again)
        assert_sampled(found, q, k, lse, layout, block, sample)


def test_sampled_offsets_beyond_32_bits():
    """More than 2^31 elements: the last rows and keys by themselves must give the same sums."""
    length, heads, dim, block, few = 430_000, 40, 128, 128, 640
    assert length * heads * dim > 2**31
    layout = TokenLayout(VideoGrid(1, 1, length))
    q, k = (torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lse = torch.full((1, heads, length), torch.inf, device="cuda")
    lse[:, :, -few - length % block :] = 10.0
    found = triton_sampled.block_sums(q, k, lse, call_of(layout, dim), (block, block), 8)[:, :, -6:, -6:]
    first = length // block * block - few
    end = TokenLayout(VideoGrid(1, 1, length - first))
    expected = triton_sampled.block_sums(
        q[:, first:], k[:, first:], lse[:, :, first:].contiguous(), call_of(end, dim), (block, block), 8
    )
    assert torch.equal(found, expected)


def search(layout, q, k, lse, counts, bits):
    """Sums, selection and lists; row_ptr from counts, as the host side makes it."""
    rows, columns = ceil_div(layout.length, 128), ceil_div(layout.length, 64)
    video_rows, video_cols = layout.text_start // 128, layout.text_start // 64
    sums = block_sums(q, k, lse, layout=layout, block=(128, 64), sample=16, options=TRITON)
    kept = triton_select.keep_largest(sums, counts, bits, video_rows, video_cols)
    place = torch.arange(rows, device="cuda")
    per_row = torch.where(place < video_rows, counts.flatten()[:, None] + columns - video_cols, columns).flatten()
    row_ptr = torch.zeros(per_row.numel() + 1, dtype=torch.int32, device="cuda")
    row_ptr[1:] = per_row.cumsum(0)
    return sums, kept, row_ptr, triton_select.expand(bits, row_ptr, per_row.numel() * columns, columns)


@pytest.fixture
def problem():
    layout = make_layout("ragged text", "cuda").aligned((128, 64))
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128, device="cuda")
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TRITON)
    counts = torch.tensor([[1, 2, 3], [4, 2, 1]], dtype=torch.int32, device="cuda")
    size = (2, 3, ceil_div(layout.length, 128), ceil_div(ceil_div(layout.length, 64), 8))
    return layout, q, k, lse, counts, torch.zeros(size, dtype=torch.uint8, device="cuda")


def test_a_search_waits_for_nothing(problem):
    search(*problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        search(*problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_search_can_be_captured_in_a_graph(problem):
    bits = problem[-1]
    *expected, ids = search(*problem)
    wanted, total = bits.clone(), int(expected[2][-1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *found, again = search(*problem)
    for x in (*found, again, bits):
        x.fill_(7)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(bits, wanted)
    assert torch.equal(again[:total], ids[:total])


def test_no_recompiles_over_sizes():
    def compiled():
        kernels = triton_select.keep_largest_kernel, triton_select.expand_kernel
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def call(rows, columns):
        sums, counts = make_sums("random", (1, 2, rows, columns), "cuda"), counts_for((1, 2), columns)
        assert_expands(triton_select, assert_selects(triton_select, sums, counts, rows, columns))

    call(3, 1100)
    before = compiled()
    for rows, columns in ((16, 1104), (1, 2048), (17, 1025)):
        call(rows, columns)
    assert compiled() == before
