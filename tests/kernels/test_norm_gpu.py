"""`norm_rotate` on a GPU: accuracy in every precision, real widths, 64-bit offsets, no syncs, no recompiles."""

from dataclasses import replace

import pytest
import torch
from inputs import TRITON, PoisonedEmpty
from norms import FORMS, assert_parity, make_problem

from videosparse.kernels import KernelOptions, Stream, norm_op, norm_rotate
from videosparse.layout import VideoGrid

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = {"wan": (40, 128), "wan fused": (12, 128), "hunyuan dual": (24, 128), "hunyuan single": (24, 128)}
WIDTHS["mochi"] = (24, 128)
MIDDLE = VideoGrid(3, 9, 11)


def check(form, dtype=torch.bfloat16, **kwargs):
    problem = make_problem(form, dtype, device="cuda", **{"grid": MIDDLE, "text": 40, **kwargs})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", PoisonedEmpty())
        fused = problem.project("on")
    assert_parity(problem, fused)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 87])
def test_families(form, dtype, gap):
    heads, dim = WIDTHS[form]
    check(form, dtype, heads=heads, dim=dim, gap=gap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("view", ["thirds", "odd"])
def test_strides(form, view):
    check(form, heads=24, dim=128, gap=5, view=view)


@pytest.mark.parametrize("form", ["wan", "hunyuan dual", "mochi"])
@pytest.mark.parametrize(
    ("heads", "dim"), [(1, 64), (2, 10), (3, 80), (5, 96), (7, 2), (16, 64), (64, 128), (128, 128)]
)
def test_heads_and_head_dims(form, heads, dim):
    check(form, heads=heads, dim=dim, gap=3)


@pytest.mark.parametrize("form", FORMS)
def test_without_rotary(form):
    check(form, rotary=False)


@pytest.mark.parametrize("form", ["wan", "mochi"])
def test_split_programs_give_the_same_bits(form):
    from videosparse.kernels import triton_norm

    problem = make_problem(form, torch.bfloat16, heads=24, dim=128, gap=4, device="cuda", grid=MIDDLE)
    work = triton_norm.choose_work(24, 128)
    outs = [
        triton_norm.forward(*problem.streams(), problem.turns(), 24, problem.layout.text_start, work=choice)
        for choice in (work, replace(work, split=True))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*outs, strict=True))


def test_offsets_beyond_32_bits():
    """More than 2^31 elements in, and out: a wrapped offset would read and write elsewhere."""
    tokens, heads, dim = 430_000, 40, 128
    assert tokens * heads * dim > 2**31
    q = torch.randn(1, tokens, heads * dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(heads * dim, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(tokens, 1, dim // 2, device="cuda")
    found = norm_rotate(Stream(q, q, weight, weight, 1e-6), heads=heads, rotary=(angles.cos(), angles.sin()))
    few = slice(tokens - 50, None)
    end = Stream(q[:, few], q[:, few], weight, weight, 1e-6)
    expected = norm_rotate(end, heads=heads, rotary=(angles[few].cos(), angles[few].sin()))
    assert all(torch.equal(x[:, few], y) for x, y in zip(found, expected, strict=True))


def streams(problem):
    video, text = problem.streams()
    start = None if text is None else problem.layout.text_start
    return (video, text), {"heads": problem.attn.heads, "rotary": problem.turns(), "text_start": start}


def test_nothing_waits_for_the_device():
    args, kwargs = streams(make_problem("hunyuan dual", torch.bfloat16, gap=4, device="cuda"))
    norm_rotate(*args, **kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm_rotate(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_calls_can_be_captured_in_a_graph():
    args, kwargs = streams(make_problem("mochi", torch.bfloat16, gap=4, device="cuda"))
    expected = norm_rotate(*args, **kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = norm_rotate(*args, **kwargs)
    for x in found:
        x.fill_(7.0)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_no_recompiles_over_lengths_batches_and_gaps():
    from videosparse.kernels.triton_norm import norm_rotate_kernel

    def call(form, grid, gap, batch, text):
        problem = make_problem(form, torch.bfloat16, grid=grid, gap=gap, batch=batch, text=text, heads=24, dim=128,
                               device="cuda")  # fmt: skip
        args, kwargs = streams(problem)
        norm_rotate(*args, **kwargs)

    def compiled():
        return len(norm_rotate_kernel.device_caches[torch.cuda.current_device()][0])

    for form in ("wan", "hunyuan dual"):
        for gap in (23, 0):  # which are two
            call(form, VideoGrid(3, 5, 7), gap, 2, 40)
        before = compiled()
        for grid, gap, batch, text in [
            (VideoGrid(1, 4, 4), 0, 1, 16), (VideoGrid(5, 8, 16), 128, 1, 256), (VideoGrid(2, 3, 4), 1, 3, 7),
        ]:  # fmt: skip
            call(form, grid, gap, batch, text)
        assert compiled() == before


@pytest.mark.parametrize("form", FORMS)
def test_the_op_is_well_formed(form):
    (video, text), kwargs = streams(make_problem(form, torch.bfloat16, gap=2, device="cuda"))
    of_text = (None,) * 4 + (1.0,) if text is None else (text.q, text.k, text.q_weight, text.k_weight, text.eps)
    arguments = (video.q, video.k, video.q_weight, video.k_weight, video.eps, *of_text, *kwargs["rotary"])
    start = kwargs["text_start"] or video.q.shape[1]
    torch.library.opcheck(norm_op.norm_rotate_forward, (*arguments, 3, start, "triton"))


def test_compiles_to_one_graph():
    args, kwargs = streams(make_problem("hunyuan dual", torch.bfloat16, gap=2, device="cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: norm_rotate(*args, **kwargs, options=TRITON)[0] + 1, fullgraph=True)
    torch.testing.assert_close(compiled(), norm_rotate(*args, **kwargs, options=TRITON)[0] + 1)


def test_torch_backend_on_the_gpu():
    problem = make_problem("mochi", torch.bfloat16, gap=2, device="cuda")
    args, kwargs = streams(problem)
    found = norm_rotate(*args, **kwargs, options=KernelOptions(backend="torch"))
    assert_parity(problem, (*found, problem.project("off")[2]))
