"""`norm_rotate` under Triton's interpreter, which must be on before Triton is imported: see interpreter.py.

float16 and float32 only: the interpreter computes bfloat16 wrongly.
"""

from dataclasses import replace

import pytest
import torch
from inputs import TRITON, PoisonedEmpty
from norms import FORMS, GRID, assert_parity, make_problem

from videosparse.kernels import Stream, norm_rotate


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gap", "dtype"), [(0, torch.float16), (5, torch.float32)])
def test_families(form, gap, dtype):
    problem = make_problem(form, dtype, gap=gap)
    assert_parity(problem, problem.project("on"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("view", ["thirds", "odd"])
def test_strides(form, view):
    problem = make_problem(form, torch.float16, gap=5, view=view)
    assert_parity(problem, problem.project("on"))


@pytest.mark.parametrize("form", ["wan", "hunyuan dual", "mochi"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 10), (5, 80), (7, 2), (8, 6), (12, 16), (40, 8)])
def test_heads_and_head_dims(form, heads, dim):
    problem = make_problem(form, torch.float32, batch=1, heads=heads, dim=dim, gap=2)
    assert_parity(problem, problem.project("on"))


@pytest.mark.parametrize("form", FORMS)
def test_without_rotary(form):
    problem = make_problem(form, torch.float16, rotary=False)
    assert_parity(problem, problem.project("on"))


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_weights_of_another_dtype(weight_dtype):
    problem = make_problem("hunyuan dual", torch.float16, weight_dtype=weight_dtype, gap=3)
    video, text = problem.streams()
    q, k = norm_rotate(
        video, text, heads=3, rotary=problem.turns(), text_start=problem.layout.text_start, options=TRITON
    )
    for ours, true in zip((q, k), problem.truth(), strict=True):
        torch.testing.assert_close(ours, true.half(), rtol=2**-10, atol=1e-6)


def test_cos_and_sin_of_different_strides():
    problem = make_problem("mochi", torch.float32, text=0)
    cos, sin = problem.turns()
    sin = sin.transpose(0, 1).contiguous().transpose(0, 1)
    assert cos.stride() != sin.stride()
    q, _ = norm_rotate(problem.streams()[0], heads=3, rotary=(cos, sin), options=TRITON)
    torch.testing.assert_close(q, problem.truth()[0].float(), rtol=1e-5, atol=1e-5)


def test_q_and_k_of_different_strides():
    problem = make_problem("wan", torch.float32)
    other = make_problem("wan", torch.float32, view="odd")
    video, second = problem.streams()[0], other.streams()[0]
    mixed = Stream(video.q, second.k, video.q_weight, second.k_weight, video.eps)
    q, k = norm_rotate(mixed, heads=3, options=TRITON)
    problem.angles = other.angles = None
    torch.testing.assert_close(q, problem.truth()[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k, other.truth()[1].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dimension", ["sample", "token"])
def test_offsets_beyond_32_bits(dimension):
    """Strides below 2^31 whose last multiple is above; only the touched pages of the storage exist."""
    problem = make_problem("wan", torch.float16, batch=3)
    tokens, width = GRID.tokens, 48
    strides = {"sample": (2**30 + 64, width, 1), "token": (width, 2**28 + 64, 1)}[dimension]
    shape = (3, tokens, width)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert size > 2**31
    storage = torch.empty.empty(size + 8192, dtype=torch.float16)
    video = problem.streams()[0]
    q, k = (storage.as_strided(shape, strides, i * 4096).copy_(x) for i, x in enumerate((video.q, video.k)))
    far = Stream(q, k, video.q_weight, video.k_weight, video.eps)
    found = norm_rotate(far, heads=3, rotary=problem.turns(), options=TRITON)
    expected = norm_rotate(video, heads=3, rotary=problem.turns(), options=TRITON)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_split_programs_give_the_same_bits():
    from videosparse.kernels import triton_norm

    problem = make_problem("hunyuan dual", torch.float16, gap=4)
    work = triton_norm.choose_work(3, 16)
    outs = [
        triton_norm.forward(*problem.streams(), problem.turns(), 3, problem.layout.text_start, work=choice)
        for choice in (work, replace(work, split=True))
    ]
    assert all(torch.equal(x, y) for x, y in zip(*outs, strict=True))
