"""The Triton kernels on a GPU: accuracy for every geometry, real grids, 64-bit offsets, no syncs, no recompiles.

On Hopper everything runs with its own kernel, as far as that takes the call, and again with the portable one.

Every combination of dtype, head size, block and options compiles anew (about a second), so the matrix is thin where the
interpreter has seen the geometry already."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from inputs import (
    BLOCKS,
    LAYOUTS,
    MAP_SHARES,
    OTHER_CALLS,
    TORCH,
    TRITON,
    PoisonedEmpty,
    assert_accurate,
    assert_same_of_both_ids,
    assert_sums_accurate,
    make_layout,
    make_map,
)
from inputs import make_qkv as make_qkv_on

from videosparse.blocks import BlockMap
from videosparse.cases import CASES
from videosparse.kernels import KernelOptions, attend, block_sums, compiled, describe_backend, gpu, ops
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.kernels.backend import unavailable
from videosparse.layout import TokenLayout, VideoGrid, ceil_div

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

MIDDLE = VideoGrid(5, 13, 17)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def once(test):
    """Run a test with one kernel of `_kernel` only: with the other it would do the same again."""
    test.once = True
    return test


@pytest.fixture(autouse=True, params=["special", "portable"])
def _kernel(request):
    if request.param == "special":
        yield
        return
    if getattr(request.function, "once", False):
        pytest.skip("is the same with each kernel")
    if not gpu.is_hopper(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("this GPU has the portable kernel only")
    with gpu.portable_only():
        yield


def make_qkv(layout, dtype, **kwargs):
    return make_qkv_on(layout, dtype, device="cuda", **kwargs)


def run_and_check(layout, block_map, q, k, v, **kwargs):
    index = None if block_map is None else block_map.index()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", PoisonedEmpty())
        out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON, **kwargs)
    assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map, **kwargs)


def few_rows(layout, count=4):
    """Query positions worth checking in a long sequence: a run at each end, and some between."""
    places = torch.randint(0, layout.length, (64 * count,), device="cuda")
    ends = torch.arange(64, device="cuda")
    return torch.cat([ends, layout.length - 1 - ends, places]).unique()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_sparse_layouts(kind, block):
    layout = make_layout(kind, "cuda", MIDDLE).aligned(block)
    run_and_check(layout, make_map(layout, block, device="cuda"), *make_qkv(layout, torch.bfloat16, dim=128))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_dense_layouts(kind, aligned):
    layout = make_layout(kind, "cuda", MIDDLE)
    layout = layout.aligned((128, 128)) if aligned else layout
    run_and_check(layout, None, *make_qkv(layout, torch.bfloat16, dim=128))


@pytest.mark.parametrize("block", [None, (64, 64), (128, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_dtypes(block, dtype, dim):
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned((128, 128))
    block_map = None if block is None else make_map(layout, block, device="cuda")
    run_and_check(layout, block_map, *make_qkv(layout, dtype, dim=dim))


@pytest.mark.parametrize("dim", [8, 12, 32, 80, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dims(dim, dtype):
    layout = make_layout("ragged text", "cuda").aligned((64, 128))
    run_and_check(layout, make_map(layout, (64, 128), device="cuda"), *make_qkv(layout, dtype, dim=dim))


def test_output_without_lse_is_the_same():
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    for index in (None, make_map(layout, (128, 128), device="cuda").index()):
        out, _ = attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON)
        assert torch.equal(out, attend(q, k, v, layout=layout, index=index, options=TRITON))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["contiguous", "fused", "head-major"])
def test_shared_maps_and_strides(share, view):
    layout = make_layout("ragged text", "cuda").aligned((64, 64))
    block_map = make_map(layout, (64, 64), share, device="cuda")
    run_and_check(layout, block_map, *make_qkv(layout, torch.bfloat16, view=view))


@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_scale(scale):
    layout = make_layout("video", "cuda")
    run_and_check(layout, None, *make_qkv(layout, torch.bfloat16, dim=128), scale=scale)


def test_unaligned_views():
    """Strides and pointers that are no multiple of 16 bytes."""
    layout = make_layout("video", "cuda")
    wide = torch.randn(3, 2, layout.length, 3, 67, device="cuda").bfloat16()
    run_and_check(layout, make_map(layout, (128, 128), device="cuda"), *(x[..., 1:65] for x in wide))


def test_full_map_is_dense_and_sdpa():
    layout = TokenLayout(MIDDLE)
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v))).transpose(1, 2)
    eager = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    allowed = allowed_error(expected, eager)
    for block in BLOCKS:
        index = BlockMap.full(layout, block, "cuda").index()
        out, _ = attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON)
        assert worst_row(out, expected) <= allowed
    out, _ = attend(q, k, v, layout=layout, return_lse=True, options=TRITON)
    assert worst_row(out, expected) <= allowed


def test_disjoint_maps_merged_by_lse_are_one_call():
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned((128, 128))
    q, k, v = make_qkv(layout, torch.float32)
    whole = make_map(layout, (128, 128), "per head", density=0.8, device="cuda")
    part = whole.keep & (torch.rand(whole.keep.shape, device="cuda") < 0.5)
    pieces = []
    for keep in (part, whole.keep & ~part):
        index = BlockMap(keep, whole.block, layout.length, layout.length).index()
        pieces.append(attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON))
    merged = torch.logaddexp(pieces[0][1], pieces[1][1])
    level = merged.masked_fill(merged == -torch.inf, 0)
    out = sum(p[0] * torch.exp(p[1] - level).transpose(1, 2)[..., None] for p in pieces)
    torch.testing.assert_close(out, attend(q, k, v, layout=layout, index=whole.index(), options=TRITON))


def test_the_same_call_gives_the_same_bits():
    layout = make_layout("ragged text", "cuda", VideoGrid(9, 30, 52)).aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    index = make_map(layout, (128, 128), "per head", device="cuda").index()
    outs = [attend(q, k, v, layout=layout, index=index, options=TRITON) for _ in range(3)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model.family != "wan" or "14b" in name])
def test_real_grids(name):
    """Two heads of each real case, and a few query rows of them against fp64."""
    case = CASES[name]
    layout = case.layout()
    if layout.text:
        lens = torch.tensor([layout.text_start + 77], dtype=torch.int32, device="cuda")
        layout = dataclasses.replace(layout, seq_lens=lens)
    for block in ((128, 128), (128, 64)):
        aligned = layout.aligned(block)
        block_map = make_map(aligned, block, samples=1, heads=2, density=0.1, device="cuda")
        q, k, v = make_qkv(aligned, torch.bfloat16, batch=1, heads=2, dim=case.model.head_dim)
        out, lse = attend(q, k, v, layout=aligned, index=block_map.index(), return_lse=True, options=TRITON)
        assert_accurate(out, lse, q, k, v, layout=aligned, block_map=block_map, rows=few_rows(aligned, count=2))


def test_offsets_beyond_32_bits():
    """Every tensor has more than 2^31 elements: a wrapped offset would read and write elsewhere."""
    heads, dim = 64, 128
    layout = TokenLayout(VideoGrid(65, 64, 64))
    assert layout.length * heads * dim > 2**31
    rows = ceil_div(layout.length, 128)
    keep = torch.zeros(1, 1, rows, rows, dtype=torch.bool, device="cuda")
    keep[..., torch.arange(rows), torch.arange(rows)] = True
    keep[..., -1] = True
    block_map = BlockMap(keep, (128, 128), layout.length, layout.length)
    q, k, v = (torch.randn(1, layout.length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = attend(q, k, v, layout=layout, index=block_map.index(), return_lse=True, options=TRITON)
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        few = [x[:, :, one].contiguous() for x in (out, q, k, v)]
        assert_accurate(
            few[0], lse[:, one], *few[1:], layout=layout, block_map=block_map, rows=few_rows(layout, count=1)
        )


def test_list_offsets_and_many_samples():
    """More programs than one grid dimension of 65,535 holds."""
    layout = TokenLayout(VideoGrid(1, 10, 13))
    q, k, v = make_qkv(layout, torch.bfloat16, batch=600, heads=40, dim=16)
    block_map = BlockMap(torch.rand(1, 40, 3, 3, device="cuda") < 0.5, (64, 64), layout.length, layout.length)
    out = attend(q, k, v, layout=layout, index=block_map.index(), options=TRITON)
    few = [x[-2:] for x in (out, q, k, v)]
    assert_accurate(few[0], None, *few[1:], layout=layout, block_map=block_map)


def test_nothing_waits_for_the_device():
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    index = make_map(layout, (128, 128), device="cuda").index()
    for chosen in (None, index):
        attend(q, k, v, layout=layout, index=chosen, return_lse=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chosen in (None, index):
            attend(q, k, v, layout=layout, index=chosen, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_calls_can_be_captured_in_a_graph():
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    index = make_map(layout, (128, 128), device="cuda").index()
    expected = attend(q, k, v, layout=layout, index=index, options=TRITON)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, layout=layout, index=index, options=TRITON)
    for _ in range(3):
        out.fill_(7.0)
        graph.replay()
        assert torch.equal(out, expected)


def test_calls_on_two_streams_at_a_time():
    layout = make_layout("ragged text", "cuda", VideoGrid(9, 30, 52)).aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    index = make_map(layout, (128, 128), "per head", density=0.3, device="cuda").index()
    expected = attend(q, k, v, layout=layout, index=index, options=TRITON)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs = []
    for i in range(6):
        with torch.cuda.stream(streams[i % 2]):
            outs.append(attend(q, k, v, layout=layout, index=index, options=TRITON))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


def test_no_recompiles_over_lengths_densities_and_maps():
    from videosparse.kernels.triton_forward import forward_kernel

    def count():
        return len(compiled.KEPT), len(forward_kernel.device_caches[torch.cuda.current_device()][0])

    def call(frames, height, density, share, samples, heads):
        grid = VideoGrid(frames, height, 17)
        layout = TokenLayout(
            grid, 40, seq_lens=torch.full((samples,), grid.tokens + 8, dtype=torch.int32, device="cuda")
        )
        layout = layout.aligned((128, 128))
        q, k, v = make_qkv(layout, torch.bfloat16, batch=samples, heads=heads, dim=128, view="fused")
        block_map = make_map(layout, (128, 128), share, samples, heads, density, "cuda")
        index = block_map.index()
        # a view into a larger buffer, as a cached plan may hold, need not start on 16 bytes
        ids = torch.cat([index.ids.new_zeros(samples), index.ids])[samples:]
        attend(q, k, v, layout=layout, index=dataclasses.replace(index, ids=ids), return_lse=True, options=TRITON)

    call(3, 13, 0.5, "shared", 2, 3)
    before = count()
    for arguments in [*OTHER_CALLS, (7, 19, 0.3, "per sample and head", 2, 5)]:
        call(*arguments)
    assert count() == before


@pytest.mark.parametrize("kind", ["video", "ragged text"])
@pytest.mark.parametrize("block", BLOCKS)
def test_ids_of_both_sizes_give_the_same(kind, block, monkeypatch):
    layout = make_layout(kind, "cuda", MIDDLE).aligned(block)
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    call = lambda x: attend(q, k, v, layout=layout, index=x, return_lse=True, options=TRITON)  # noqa: E731
    block_map = make_map(layout, block, "per head", device="cuda")
    assert_same_of_both_ids(call, block_map, monkeypatch)
    assert_accurate(*call(block_map.index()), q, k, v, layout=layout, block_map=block_map)


def test_compiles_to_one_graph():
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16)
    index = make_map(layout, (128, 128), device="cuda").index()
    block = lambda q, k, v: attend(q * 2, k, v, layout=layout, index=index) + 1  # noqa: E731
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(block, backend="aot_eager", fullgraph=True)(q, k, v), block(q, k, v), equal_nan=True
    )


def test_the_op_is_well_formed():
    layout = make_layout("ragged text", "cuda").aligned((64, 64))
    q, k, v = (x.nan_to_num().requires_grad_() for x in make_qkv(layout, torch.bfloat16))
    index = make_map(layout, (64, 64), device="cuda").index()
    lists = (index.row_ptr, index.ids, index.order, layout.seq_lens, layout.video, layout.text_start)
    index.prepare_backward()
    turned = (index.key_major.row_ptr, index.key_major.ids, index.key_major.order)
    torch.library.opcheck(
        ops.attend_forward,
        (q, k, v, *lists, *index.block, 1, 1, 0.25, None, 0, 0, 0, True, "triton", None, True, *turned),
    )


def test_gradients_are_as_accurate_as_on_the_cpu():
    layout = make_layout("ragged text", "cuda").aligned((64, 64))
    inputs = make_qkv(layout, torch.float32)
    index = make_map(layout, (64, 64), "per head", device="cuda").index()
    tensors = {name: getattr(index, name).cpu() for name in ("row_ptr", "ids", "order")}
    cpu_layout = dataclasses.replace(layout, seq_lens=layout.seq_lens.cpu())
    cpu_index = dataclasses.replace(index, **tensors)

    def gradients(device, dtype, options=TORCH, flip=()):
        where, lists = (layout, index) if device == "cuda" else (cpu_layout, cpu_index)
        q, k, v = (x.to(device, dtype).flip(flip).requires_grad_() for x in inputs)
        out = attend(q, k, v, layout=where, index=lists, options=options)
        return [g.cpu().flip(flip) for g in torch.autograd.grad(out.square().sum(), (q, k, v))]

    ours, truth = gradients("cuda", torch.float32, TRITON), gradients("cpu", torch.float64)
    # plain torch is asked in several orders of summation, so that no fresh input fails by chance
    tries = [gradients(device, torch.float32, flip=flip) for device in ("cpu", "cuda") for flip in ((), (3,))]
    for found, true, *plain in zip(ours, truth, *tries, strict=True):
        assert worst_row(found, true) <= max(allowed_error(true, x) for x in plain)


def test_torch_backend_and_block_sums_on_the_gpu():
    layout = make_layout("ragged text", "cuda").aligned((64, 64))
    q, k, v = make_qkv(layout, torch.bfloat16)
    block_map = make_map(layout, (64, 64), device="cuda")
    out, lse = attend(q, k, v, layout=layout, index=block_map.index(), return_lse=True, options=TORCH)
    assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map)
    _, dense = attend(q, k, v, layout=layout, return_lse=True)
    sums = block_sums(q, k, dense, layout=layout, block=(64, 64)).sum(3)
    unit = torch.finfo(torch.float32).eps * dense[dense.isfinite()].abs().max()
    torch.testing.assert_close(sums[:, :, :4], torch.full_like(sums[:, :, :4], 64.0), rtol=4 * unit.item(), atol=0)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_block_sums(kind, block):
    for layout in (make_layout(kind, "cuda", MIDDLE), make_layout(kind, "cuda", MIDDLE).aligned(block)):
        for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 64), (torch.bfloat16, 80)):
            check_sums(*make_qkv(layout, dtype, dim=dim, view="fused"), layout, block)


def check_sums(q, k, v, layout, block):
    """Poisoned output, twice the same bits, and as exact as plain torch in fp32 on the same q, k and lse."""
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TRITON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", PoisonedEmpty())
        found = block_sums(q, k, lse, layout=layout, block=block, options=TRITON)
    assert torch.equal(found, block_sums(q, k, lse, layout=layout, block=block, options=TRITON))
    assert_sums_accurate(found, q, k, lse, layout, block)


def test_block_sums_of_a_sparse_lse():
    """Rows that read no key count nothing."""
    layout = TokenLayout(MIDDLE)
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128)
    block_map = make_map(layout, (64, 64), device="cuda")
    _, lse = attend(q, k, v, layout=layout, index=block_map.index(), return_lse=True, options=TRITON)
    sums = block_sums(q, k, lse, layout=layout, block=(64, 64), options=TRITON)
    assert (sums[:, :, 1] == 0).all()
    assert_sums_accurate(sums, q, k, lse, layout, (64, 64))


def test_block_sums_wait_for_nothing_and_can_be_captured():
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    expected = block_sums(q, k, lse, layout=layout, block=(128, 128))
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sums(q, k, lse, layout=layout, block=(128, 128))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = block_sums(q, k, lse, layout=layout, block=(128, 128))
    sums.fill_(7.0)
    graph.replay()
    assert torch.equal(sums, expected)


@once
@pytest.mark.parametrize("backend", ["fa4", "flex"])
@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("block", [(128, 128), (128, 64)])
def test_libraries(backend, share, block):
    if (reason := unavailable(backend, torch.device("cuda"), torch.bfloat16)) is not None:
        pytest.skip(reason)
    options = KernelOptions(backend=backend)
    for kind, dim in (("video", 128), ("video", 64), ("ragged text", 128)):
        layout = make_layout(kind, "cuda", MIDDLE).aligned(block)
        q, k, v = make_qkv(layout, torch.bfloat16, dim=dim)
        block_map = make_map(layout, block, share, device="cuda")
        index = block_map.index()
        if backend == "fa4" and kind != "video":
            with pytest.raises(RuntimeError, match="cannot mask text padding"):
                attend(q, k, v, layout=layout, index=index, options=options)
            continue
        out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=options)
        assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map)
        attend(q, k, v, layout=layout, index=index, options=options)  # compiling for a call without lse may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = attend(q, k, v, layout=layout, index=index, options=options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, again)


@once
def test_auto_takes_triton():
    assert describe_backend("cuda")[0] == "triton"


@pytest.mark.skipif(
    "not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)", reason="needs Hopper"
)
@once
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_takes_its_own_kernel(dtype, dim, monkeypatch):
    monkeypatch.setattr("videosparse.kernels.triton_forward.forward", None)
    layout = make_layout("ragged text", "cuda").aligned((128, 64))
    block_map = make_map(layout, (128, 64), "per head", device="cuda")
    for view in ("fused", "head-major"):
        run_and_check(layout, block_map, *make_qkv(layout, dtype, dim=dim, view=view))
        run_and_check(layout, None, *make_qkv(layout, dtype, dim=dim, view=view))
