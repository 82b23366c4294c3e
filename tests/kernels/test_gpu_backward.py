"""The backward kernels on a GPU: accuracy for every geometry, equal bits, no syncs or recompiles, compile, checkpoints.

On Hopper most of it runs with its own kernels, and again with the portable ones.
"""

import dataclasses

import pytest
import torch
import torch.utils.checkpoint
from gradients import assert_gradients, make_grads
from inputs import (
    BLOCKS,
    LAYOUTS,
    MAP_SHARES,
    OTHER_CALLS,
    TRITON,
    PoisonedEmpty,
    assert_same_of_both_ids,
    make_layout,
    make_map,
    make_qkv,
)

from videosparse.kernels import KernelOptions, attend, gpu, hopper_backward, triton_backward
from videosparse.kernels.backend import unavailable
from videosparse.layout import VideoGrid

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

MIDDLE = VideoGrid(5, 13, 17)


def call_of(layout, index, **kwargs):
    """out and lse of attend as a function of q, k and v."""
    return lambda q, k, v: attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON, **kwargs)


def gradients(function, inputs, grads):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grads)


def run_and_check(layout, block_map, q, k, v, **kwargs):
    grads = make_grads(layout, q)
    index = None if block_map is None else block_map.index()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", PoisonedEmpty())
        found = gradients(call_of(layout, index, **kwargs), (q, k, v), grads)
    assert_gradients(found, q, k, v, *grads, layout=layout, block_map=block_map, **kwargs)


@pytest.fixture(params=["best", "portable"])
def kernels(request):
    if request.param == "best":
        yield
    elif not gpu.special_kernel("gradients of attend", torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("this GPU has the portable kernels only")
    else:
        with gpu.portable_only():
            yield


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_sparse_layouts(kind, block, kernels):
    layout = make_layout(kind, "cuda", MIDDLE).aligned(block)
    block_map = make_map(layout, block, device="cuda")
    run_and_check(layout, block_map, *make_qkv(layout, torch.bfloat16, dim=128, device="cuda"))


@pytest.mark.parametrize("block", BLOCKS)
def test_ids_of_both_sizes_give_the_same(block, kernels, monkeypatch):
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned(block)
    inputs = make_qkv(layout, torch.bfloat16, dim=128, device="cuda")
    grads = make_grads(layout, inputs[0])
    call = lambda x: gradients(call_of(layout, x), inputs, grads)  # noqa: E731
    assert_same_of_both_ids(call, make_map(layout, block, "per head", device="cuda"), monkeypatch)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_dense_layouts(kind, aligned, kernels):
    layout = make_layout(kind, "cuda", MIDDLE)
    layout = layout.aligned((128, 128)) if aligned else layout
    run_and_check(layout, None, *make_qkv(layout, torch.bfloat16, dim=128, device="cuda"))


@pytest.mark.parametrize("block", [None, (64, 64), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_dtypes(block, dtype, dim):
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned((128, 128))
    block_map = None if block is None else make_map(layout, block, device="cuda")
    run_and_check(layout, block_map, *make_qkv(layout, dtype, dim=dim, device="cuda"))


@pytest.mark.parametrize("dim", [8, 12, 32, 80, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dims(dim, dtype):
    layout = make_layout("ragged text", "cuda").aligned((64, 128))
    block_map = make_map(layout, (64, 128), device="cuda")
    run_and_check(layout, block_map, *make_qkv(layout, dtype, dim=dim, device="cuda"))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["contiguous", "fused", "head-major"])
def test_shared_maps_and_strides(share, view):
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    block_map = make_map(layout, (128, 128), share, device="cuda")
    run_and_check(layout, block_map, *make_qkv(layout, torch.bfloat16, view=view, device="cuda"))


@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_scale(scale):
    layout = make_layout("video", "cuda")
    run_and_check(layout, None, *make_qkv(layout, torch.bfloat16, dim=128, device="cuda"), scale=scale)


def test_unaligned_views():
    """Strides and pointers that are no multiple of 16 bytes."""
    layout = make_layout("video", "cuda")
    wide = torch.randn(3, 2, layout.length, 3, 67, device="cuda").bfloat16()
    run_and_check(layout, make_map(layout, (128, 128), device="cuda"), *(x[..., 1:65] for x in wide))


def test_scores_far_below_zero_do_not_overflow():
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned((128, 128))
    q, k, v = make_qkv(layout, torch.float16, dim=128, device="cuda")
    run_and_check(layout, make_map(layout, (128, 128), device="cuda"), q.abs() + 4, -k.abs() - 4, v)


@pytest.mark.parametrize("block", BLOCKS)
def test_equal_inputs_give_equal_bits(block, kernels):
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned(block)
    inputs = make_qkv(layout, torch.bfloat16, dim=128, device="cuda")
    grads = make_grads(layout, inputs[0])
    function = call_of(layout, make_map(layout, block, "per head", device="cuda").index())
    expected = gradients(function, inputs, grads)
    for _ in range(5):
        for first, again in zip(expected, gradients(function, inputs, grads), strict=True):
            assert torch.equal(first, again)


def test_compiled_and_checkpointed():
    layout = make_layout("ragged text", "cuda", MIDDLE).aligned((128, 128))
    inputs = make_qkv(layout, torch.bfloat16, dim=128, device="cuda")
    grads = make_grads(layout, inputs[0])
    function = call_of(layout, make_map(layout, (128, 128), "per head", device="cuda").index())
    expected = gradients(function, inputs, grads)
    torch._dynamo.reset()
    others = [
        torch.compile(function, backend="aot_eager", fullgraph=True),
        *(lambda *x, r=r: torch.utils.checkpoint.checkpoint(function, *x, use_reentrant=r) for r in (False, True)),
    ]
    for other in others:
        found = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.backward(other(*found), grads)  # reentrant checkpoints refuse autograd.grad
        for first, again in zip(expected, found, strict=True):
            assert torch.equal(first, again.grad)


def test_nothing_waits_for_the_device():
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    inputs = make_qkv(layout, torch.bfloat16, device="cuda")
    grads = make_grads(layout, inputs[0])
    block_map = make_map(layout, (128, 128), device="cuda")
    for index in (None, block_map.index()):
        gradients(call_of(layout, index), inputs, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in (None, block_map.index(capacity=100)):
            gradients(call_of(layout, index), inputs, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_recompiles_over_lengths_densities_and_maps(kernels):
    modules = triton_backward, hopper_backward
    jitted = [getattr(m, n) for m in modules for n in ("query_kernel", "key_kernel", "prepare_kernel") if hasattr(m, n)]

    def compiled():
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in jitted)

    def call(frames, height, density, share, samples, heads):
        grid = VideoGrid(frames, height, 17)
        lens = torch.full((samples,), grid.tokens + 8, dtype=torch.int32, device="cuda")
        layout = dataclasses.replace(make_layout("text", "cuda", grid), seq_lens=lens).aligned((128, 128))
        inputs = make_qkv(layout, torch.bfloat16, batch=samples, heads=heads, view="fused", device="cuda")
        index = make_map(layout, (128, 128), share, samples, heads, density, "cuda").index()
        gradients(call_of(layout, index), inputs, make_grads(layout, inputs[0]))

    call(3, 13, 0.5, "shared", 2, 3)
    before = compiled()
    for arguments in OTHER_CALLS:
        call(*arguments)
    assert compiled() == before


def test_calls_can_be_captured_in_a_graph():
    layout = make_layout("ragged text", "cuda").aligned((128, 128))
    inputs = make_qkv(layout, torch.bfloat16, device="cuda")
    grads = make_grads(layout, inputs[0])
    function = call_of(layout, make_map(layout, (128, 128), device="cuda").index())
    expected = gradients(function, inputs, grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(function, inputs, grads)
    for x in found:
        x.fill_(7.0)
    graph.replay()
    for first, again in zip(expected, found, strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("backend", ["fa4", "flex"])
@pytest.mark.parametrize("kind", ["video", "ragged text"])
def test_gradients_behind_libraries(backend, kind):
    """The library's forward and its lse, our backward."""
    if (reason := unavailable(backend, torch.device("cuda"), torch.bfloat16)) is not None:
        pytest.skip(reason)
    if backend == "fa4" and kind != "video":
        pytest.skip("it cannot mask text padding")
    layout = make_layout(kind, "cuda", MIDDLE).aligned((128, 128))
    block_map = make_map(layout, (128, 128), device="cuda")
    q, k, v = make_qkv(layout, torch.bfloat16, dim=128, device="cuda")
    options = KernelOptions(backend=backend)
    grads = make_grads(layout, q)

    def function(q, k, v):
        return attend(q, k, v, layout=layout, index=block_map.index(), return_lse=True, options=options)

    assert_gradients(gradients(function, (q, k, v), grads), q, k, v, *grads, layout=layout, block_map=block_map)
