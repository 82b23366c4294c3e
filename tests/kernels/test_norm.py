"""`norm_rotate` on any machine: the torch backend against the formulas, what it refuses, one node in a graph."""

from dataclasses import replace

import pytest
import torch
from inputs import TORCH, TRITON
from norms import FORMS, assert_parity, make_problem

from videosparse.kernels import KernelOptions, Stream, backend, norm_op, norm_rotate

HEADS = 3


def call(problem, options=TORCH, **changes):
    video, text = problem.streams()
    start = None if text is None else problem.layout.text_start
    arguments = {"heads": HEADS, "rotary": problem.turns(), "text_start": start, "options": options}
    return norm_rotate(video, text, **{**arguments, **changes})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_is_as_accurate_as_the_steps_of_every_family(form, gap, dtype):
    problem = make_problem(form, dtype, gap=gap)
    assert_parity(problem, (*call(problem), problem.project("off")[2]))


@pytest.mark.parametrize("view", ["thirds", "odd"])
def test_strides(view):
    problem = make_problem("hunyuan dual", torch.bfloat16, gap=2, view=view)
    assert_parity(problem, (*call(problem), problem.project("off")[2]))


def test_double_precision_stays_double():
    problem = make_problem("mochi", torch.float64, gap=2)
    for ours, true in zip(call(problem), problem.truth(), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


STREAM = Stream(zeros(2, 5, 48), zeros(2, 5, 48), zeros(16), zeros(16), 1e-6)
WIDE = Stream(zeros(1, 1, 20480), zeros(1, 1, 20480), zeros(20480), zeros(20480), 1e-6)
META = {"device": "meta"}
ROTARY = (zeros(5, 1, 8), zeros(5, 1, 8))
REFUSED = {
    "rank": (ValueError, r"video.q must be \[batch, tokens, 3 heads \* head_dim\] \(got \[2, 5\]\)", {
        "video": replace(STREAM, q=zeros(2, 5))}),
    "heads": (ValueError, r"7 heads \* head_dim", {"heads": 7}),
    "shape": (ValueError, r"video.q and video.k must have one shape", {"video": replace(STREAM, k=zeros(2, 4, 48))}),
    "batch": (ValueError, r"text.q and text.k must have one shape, and batch and width of video.q \[2, 5, 48\]", {
        "text": replace(STREAM, q=zeros(3, 5, 48), k=zeros(3, 5, 48))}),
    "width": (ValueError, r"heads \* head_dim must be at most 16384 \(got 40 \* 512\)", {"video": WIDE, "heads": 40}),
    "integers": (TypeError, "video.q must be float16", {"video": replace(STREAM, q=zeros(2, 5, 48).int())}),
    "eps": (ValueError, r"video.eps must be above 0 \(got 0.0\)", {"video": replace(STREAM, eps=0.0)}),
    "dtype": (TypeError, "text.q must have the dtype of video.q, torch.float32", {
        "text": replace(STREAM, q=zeros(2, 5, 48).half())}),
    "device": (ValueError, "video.k must be on cpu like video.q", {
        "video": replace(STREAM, k=zeros(2, 5, 48, **META))}),
    "stride": (ValueError, "video.k must be contiguous along its last dimension", {
        "video": replace(STREAM, k=zeros(2, 48, 5).transpose(1, 2))}),
    "weight": (ValueError, r"video.k_weight must be \[48\] \(across heads\) or \[16\] \(per head\)", {
        "video": replace(STREAM, k_weight=zeros(48))}),
    "weight dtype": (TypeError, "video.q_weight must be float16", {
        "video": replace(STREAM, q_weight=zeros(16).int())}),
    "weight device": (ValueError, "video.q_weight must be contiguous on cpu", {
        "video": replace(STREAM, q_weight=zeros(16, **META))}),
    "start without text": (ValueError, "text_start must come after the 5 video tokens, with text", {"text_start": 7}),
    "start in the video": (ValueError, r"after the 5 video tokens, with text \(got 4\)", {
        "text": STREAM, "text_start": 4}),
    "rotary": (ValueError, r"rotary cos must be \[5 tokens, 1 or 3 heads, head_dim / 2\] \(got \[4, 1, 8\]\)", {
        "rotary": (zeros(4, 1, 8), zeros(4, 1, 8))}),
    "rotary pair": (ValueError, r"rotary sin must be \[5 tokens", {"rotary": (ROTARY[0], zeros(5, 3, 8))}),
    "rotary width": (ValueError, r"rotary cos must hold head_dim / 2 = 8 angles \(got 16\)", {
        "rotary": (zeros(5, 1, 16), zeros(5, 1, 16))}),
    "rotary dtype": (TypeError, "rotary sin must be float16", {"rotary": (ROTARY[0], ROTARY[1].int())}),
    "rotary device": (ValueError, "rotary cos must be on cpu", {
        "rotary": (zeros(5, 1, 8, **META), zeros(5, 1, 8, **META))}),
    "gradient": (RuntimeError, "norm_rotate has no gradient", {
        "video": replace(STREAM, q_weight=zeros(16, requires_grad=True))}),
    "no GPU": (RuntimeError, 'backend="triton" cannot run here', {"options": TRITON}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    error, message, changes = REFUSED[case]
    with pytest.raises(error, match=message):
        norm_rotate(**{"video": STREAM, "heads": HEADS, **changes})


def test_options():
    with pytest.raises(ValueError, match=r"fused_norm must be one of auto, on, off \(got 'yes'\)"):
        KernelOptions(fused_norm="yes")


def test_a_library_for_attention_is_as_auto():
    assert norm_rotate(STREAM, heads=HEADS, options=KernelOptions(backend="flex"))[0].shape == (2, 5, 3, 16)


def test_weights_that_need_gradients_are_fine_without_grad():
    stream = replace(STREAM, q_weight=zeros(16, requires_grad=True))
    with torch.no_grad():
        assert norm_rotate(stream, heads=HEADS)[0].shape == (2, 5, 3, 16)


def test_auto_says_once_what_it_takes(caplog):
    backend._take_automatically.cache_clear()
    with caplog.at_level("INFO", logger="videosparse"):
        for _ in range(2):
            norm_rotate(STREAM, heads=HEADS)
    assert [r.message for r in caplog.records] == [
        "norm_rotate takes the torch backend for torch.float32 on cpu: no Triton: it needs CUDA or ROCm tensors "
        "(got cpu)."
    ]


@pytest.mark.parametrize("form", FORMS)
def test_the_op_is_well_formed(form):
    video, text = (problem := make_problem(form, torch.float32, gap=2)).streams()
    of_text = (None,) * 4 + (1.0,) if text is None else (text.q, text.k, text.q_weight, text.k_weight, text.eps)
    arguments = (video.q, video.k, video.q_weight, video.k_weight, video.eps, *of_text, *problem.turns())
    start = problem.layout.text_start
    torch.library.opcheck(norm_op.norm_rotate_forward, (*arguments, HEADS, start, "torch"))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form):
    torch._dynamo.reset()
    problem = make_problem(form, torch.float32, gap=2)

    def block():
        q, k = call(problem)
        return q + 1, k * 2

    for found, expected in zip(torch.compile(block, backend="aot_eager", fullgraph=True)(), block(), strict=True):
        torch.testing.assert_close(found, expected)
