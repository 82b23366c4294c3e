"""Token orders on a GPU: bit by bit on every kernel, real sizes, 64-bit offsets, no syncs, no recompiles."""

import pytest
import torch
from inputs import LAYOUTS, TORCH, TRITON, PoisonedEmpty, make_layout, make_map, make_qkv
from norms import FORMS
from orders import CODES, GRIDS, SIX, check_attend, check_norm, check_reorder

from videosparse.blocks import BlockMap
from videosparse.kernels import Stream, attend, gpu, norm_rotate, reorder
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import SearchedOrder, TokenOrder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LAYOUT = TokenLayout(SIX)
DEVICE = {"device": "cuda"}


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("text", "gap"), [(0, 0), (6, 0), (3, 5)])
def test_reorder(grid, text, gap):
    check_reorder(grid, text, gap, torch.bfloat16, TRITON, **DEVICE)


@pytest.mark.parametrize("view", ["contiguous", "fused", "head-major"])
@pytest.mark.parametrize(("heads", "dim"), [(40, 128), (1, 10), (7, 80), (12, 64)])
def test_reorder_strides_and_sizes(view, heads, dim):
    check_reorder(SIX, 2, 1, torch.bfloat16, TRITON, heads=heads, dim=dim, view=view, **DEVICE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_rotate(form, dtype):
    check_norm(form, dtype, TRITON, heads=24, dim=128, gap=5, text=40, grid=SIX, **DEVICE)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("dim", "block"), [(128, (128, 128)), (128, (128, 64)), (64, (128, 128)), (128, None)])
def test_attend(kind, dim, block):
    layout = make_layout(kind, "cuda")
    layout = layout.aligned(block) if block else layout
    block_map = make_map(layout, block, "per head", heads=6, **DEVICE) if block else None
    check_attend(layout, block_map, *make_qkv(layout, torch.bfloat16, heads=6, dim=dim, **DEVICE), TRITON)


@pytest.mark.parametrize(
    ("dtype", "dim", "block"),
    [(torch.bfloat16, 128, (128, 128)), (torch.bfloat16, 96, (64, 64)), (torch.float32, 64, (64, 128))],
)
def test_portable(dtype, dim, block):
    layout = make_layout("ragged text", "cuda").aligned(block)
    with gpu.portable_only():
        block_map = make_map(layout, block, "per head", heads=6, **DEVICE)
        check_attend(layout, block_map, *make_qkv(layout, dtype, heads=6, dim=dim, **DEVICE), TRITON)


def test_torch_backend():
    block_map = make_map(LAYOUT, (64, 64), heads=6, **DEVICE)
    check_attend(LAYOUT, block_map, *make_qkv(LAYOUT, torch.bfloat16, heads=6, **DEVICE), TORCH)


@pytest.mark.parametrize("most", [gpu.MOST_ORDERED, 1000])
@pytest.mark.parametrize("grid", [VideoGrid(21, 45, 80), VideoGrid(128, 45, 80)], ids=str)
def test_every_position_of_real_grids(grid, most, monkeypatch):
    """By the kernel that divides positions in fp32, and by a copy."""
    monkeypatch.setattr(gpu, "MOST_ORDERED", most)
    layout, order = TokenLayout(grid), TokenOrder(grid, CODES)
    keep = torch.eye(-(-grid.tokens // 128), dtype=torch.bool, device="cuda")[None, None]
    index = BlockMap(keep, (128, 128), grid.tokens, grid.tokens).index()
    q, k, v = (torch.randn(1, grid.tokens, 6, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    plain = attend(q, k, v, layout=layout, index=index)
    assert torch.equal(attend(q, k, v, layout=layout, index=index, order=order), order.restore(plain, layout))


def test_offsets_beyond_32_bits():
    grid = VideoGrid(100, 50, 86)
    layout, order = TokenLayout(grid), TokenOrder(grid, (CODES * 7)[:40])
    x = torch.randn(1, grid.tokens, 5120, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    ones = torch.ones(5120, device="cuda", dtype=torch.bfloat16)
    raster, _ = norm_rotate(Stream(x, x, ones, ones, 1e-6), heads=40)
    ordered, _ = norm_rotate(Stream(x, x, ones, ones, 1e-6), heads=40, order=order)
    assert torch.equal(reorder(raster, order, layout), ordered)
    assert torch.equal(reorder(ordered, order, layout, inverse=True), raster)
    for head in (0, 17, 39):
        assert torch.equal(ordered[0, :, head], raster[0, order.permutation("cuda")[head], head])


@pytest.fixture
def call():
    """Everything that reads an order, as a function of it."""
    index = make_map(LAYOUT, (128, 128), heads=6, **DEVICE).index()
    q, k, v = make_qkv(LAYOUT, torch.bfloat16, heads=6, dim=128, **DEVICE)
    ones = torch.ones(768, device="cuda", dtype=torch.bfloat16)
    stream = Stream(q.flatten(2), k.flatten(2), ones, ones, 1e-6)

    def run(order):
        normed = norm_rotate(stream, heads=6, order=order)
        values = reorder(v, order, LAYOUT)
        return attend(*normed, values, layout=LAYOUT, index=index, order=order, return_lse=True)

    return run


def test_nothing_waits_for_the_device(call):
    call(TokenOrder(SIX, CODES))
    searched = SearchedOrder(SIX, torch.tensor(CODES, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(TokenOrder(SIX, CODES[::-1]))
        call(searched)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_reads_new_codes(call):
    searched = SearchedOrder(SIX, torch.tensor(CODES, device="cuda"))
    call(searched)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(searched)
    for codes in (CODES, CODES[::-1]):
        searched.codes.copy_(torch.tensor(codes, device="cuda"))
        graph.replay()
        for x, y in zip(found, call(TokenOrder(SIX, codes)), strict=True):
            assert torch.equal(x, y)


def test_no_recompiles_over_grids():
    from videosparse.kernels.triton_norm import norm_rotate_kernel
    from videosparse.kernels.triton_order import reorder_kernel

    def compiled():
        return [len(k.device_caches[torch.cuda.current_device()][0]) for k in (norm_rotate_kernel, reorder_kernel)]

    def run(grid):
        q, k, v = (torch.randn(1, grid.tokens, 6, 128, device="cuda").bfloat16() for _ in range(3))
        ones, order = torch.ones(768, device="cuda").bfloat16(), TokenOrder(grid, CODES)
        norm_rotate(Stream(q.flatten(2), k.flatten(2), ones, ones, 1e-6), heads=6, order=order)
        reorder(v, order, TokenLayout(grid))

    run(SIX)
    before = compiled()
    for grid in (
        VideoGrid(1, 16, 16),
        VideoGrid(2, 3, 4),
        VideoGrid(1, 1, 1),
        VideoGrid(16, 1, 1),
        VideoGrid(5, 16, 1),
    ):
        run(grid)
    assert compiled() == before


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 64)])
def test_gradients(dtype, dim):
    order = TokenOrder(SIX, CODES)
    index = make_map(LAYOUT, (128, 128), heads=6, **DEVICE).index()
    values = make_qkv(LAYOUT, dtype, heads=6, dim=dim, **DEVICE)
    plain, turned = ([x.clone().requires_grad_() for x in values] for _ in range(2))
    grad = torch.randn_like(values[0])
    attend(*plain, layout=LAYOUT, index=index).backward(order.apply(grad, LAYOUT))
    attend(*turned, layout=LAYOUT, index=index, order=order).backward(grad)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(plain, turned, strict=True))
