"""Integer attention under Triton's interpreter, which must be on before Triton is imported: see interpreter.py.

float16 only: the interpreter computes bfloat16 wrongly. It also cuts FP8 off where hardware rounds to nearest, so its
conversion is replaced.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import quantized
import torch
from inputs import (
    BLOCKS,
    LAYOUTS,
    MAP_SHARES,
    PoisonedEmpty,
    assert_same_of_both_ids,
    make_layout,
    make_map,
    make_qkv,
)
from triton import language as tl
from triton.runtime import interpreter

from videosparse.benchmark import checks, contenders, problems
from videosparse.blocks import BlockMap
from videosparse.kernels import KernelOptions, attend
from videosparse.kernels import quantize as module
from videosparse.kernels.call import AttentionCall
from videosparse.layout import TokenLayout, VideoGrid

SMALL = VideoGrid(2, 7, 10)
cut_off = interpreter._convert_float


def rounded(x, source, target, mode):
    if target != tl.float8e4nv:
        return cut_off(x, source, target, mode)
    return torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint8)


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())
    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def run_and_check(quant, layout, block_map, q, k, v, **kwargs):
    index = None if block_map is None else block_map.index()
    options = KernelOptions(backend="triton", quant=quant)
    out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=options, **kwargs)
    quantized.check(out, lse, q, k, v, quant, layout=layout, block_map=block_map, **kwargs)
    assert out.is_contiguous()
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)


@pytest.mark.parametrize("quant", quantized.QUANTS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("sparse", [True, False])
def test_layouts(quant, kind, sparse):
    layout = make_layout(kind, grid=SMALL)
    layout = layout.aligned((64, 64)) if sparse else layout
    block_map = make_map(layout, (64, 64), heads=2) if sparse else None
    run_and_check(quant, layout, block_map, *make_qkv(layout, torch.float16, heads=2))


@pytest.mark.parametrize("quant", quantized.QUANTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(quant, block):
    layout = make_layout("ragged text", grid=SMALL).aligned(block)
    q, k, v = make_qkv(layout, torch.float16, heads=1, dim=128)
    run_and_check(quant, layout, make_map(layout, block, heads=1), q, quantized.biased(k), v)


@pytest.mark.parametrize("quant", quantized.QUANTS)
@pytest.mark.parametrize("share", MAP_SHARES)
def test_shared_maps_and_strides(quant, share):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    block_map = make_map(layout, (64, 64), share, heads=2)
    run_and_check(quant, layout, block_map, *make_qkv(layout, torch.float16, heads=2, view="fused"))


def test_ids_of_both_sizes_give_the_same(monkeypatch):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=2)
    options = KernelOptions(backend="triton", quant="int8")
    call = lambda x: attend(q, k, v, layout=layout, index=x, options=options)  # noqa: E731
    assert_same_of_both_ids(call, make_map(layout, (64, 64), "per head", heads=2), monkeypatch)


@pytest.mark.parametrize("quant", quantized.QUANTS)
@pytest.mark.parametrize("scale", [0.2, -0.125, 0.0])
def test_scale(quant, scale):
    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    run_and_check(quant, layout, None, *make_qkv(layout, torch.float16, batch=1, heads=1), scale=scale)


@pytest.mark.parametrize(
    ("position", "wrong"), [(0, float("nan")), (1, float("inf")), (2, float("nan")), (2, float("inf"))]
)
def test_nan_of_tokens_shows(position, wrong):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=2)
    (q, k, v)[position][0, 3, 1, 5] = wrong
    for quant in quantized.QUANTS:
        if position == 2 and quant == "int8" and wrong == float("inf"):
            continue  # infinite values are multiplied as they are
        out = attend(q, k, v, layout=layout, options=KernelOptions(backend="triton", quant=quant))
        assert not out[0, 3, 1].isfinite().all()
        assert out[1].isfinite().all()


@pytest.fixture(params=["all keys", "a part of them"])
def _mean_of(request, monkeypatch):
    """The mean that keys lose is that of a part of them in calls on many tokens."""
    monkeypatch.setattr(module, "_MANY_TOKENS", 10**9 if request.param == "all keys" else 1)


@pytest.mark.usefixtures("_mean_of")
@pytest.mark.parametrize(("values", "order"), [("fp8", False), ("fp8", True), ("int8", False)])
@pytest.mark.parametrize("kind", ["video", "ragged text", "no text at all"])
def test_the_pass_is_that_of_plain_torch(values, order, kind):
    layout = make_layout(kind, grid=SMALL).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=2, dim=128, view="fused")
    k = quantized.biased(k)
    call = AttentionCall(None, layout.seq_lens, layout.video, layout.text_start, 0.1)
    found = module.quantize(q, k, v, call, True, values, order)
    expected = quantized.quantize(q, k, v, call, True, values, order)
    for name in ("q_scale", "k_scale", "v_scale", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-4)
    for name in ("q", "k"):  # a number between two integers may go either way
        difference = (getattr(found, name).int() - getattr(expected, name).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 1e-2
    assert (found.v.float() - expected.v.float()).abs().mean() < 0.05
    assert found.q.shape[2] % 128 == 0
    assert not found.q[:, :, layout.length :].any()
    assert not found.k[:, :, layout.length :].any()


@pytest.mark.usefixtures("_mean_of")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_any_mean_leaves_output_and_lse(kind):
    layout = make_layout(kind, grid=VideoGrid(3, 11, 17)).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=2)
    run_and_check("int8", layout, None, q, quantized.biased(k), v)


@pytest.mark.parametrize("grid", [(21, 64, 64), (21, 32, 128), (21, 45, 80), (64, 16, 16)])
def test_a_part_of_keys_is_everywhere_in_frames_of_any_size(grid, monkeypatch):
    """Every row, every column and every frame has its share, though not to the token."""
    monkeypatch.setattr(module, "_MANY_TOKENS", 1)
    share = 8 * quantized.counted(math.prod(grid)).view(grid).float()
    for dims in ((0, 1), (0, 2)):
        line = share.mean(dims)
        assert 0.2 < line.min() <= line.max() < 2.5
    for part in share.mean((1, 2)).split(4):  # frames of 256 tokens may have none
        assert 0.6 < part.mean() < 1.4
    assert abs(share.mean() - 1) < 0.02


@pytest.mark.parametrize("name", contenders.QUANTIZE)
@pytest.mark.parametrize("special", [False, True])
def test_the_benchmark_times_what_it_checked(name, special, monkeypatch):
    monkeypatch.setattr(contenders, "in_key_order", lambda p: special)
    monkeypatch.setattr(checks, "in_key_order", lambda p: special)
    workload = problems.Workload("tiny", TokenLayout(VideoGrid(1, 20, 20)), heads=2, head_dim=128)
    p = problems.Inputs(workload, torch.device("cpu"), torch.float16, 3).of(problems.Entry(name))
    found = contenders.CONTENDERS[name](p)()
    error, allowed = checks.check_quantize(p, found)
    assert 0.003 < error <= allowed
    wrong = {"q": found.q.flip(2), "k_scale": found.k_scale * 1.05, "k": found.k.roll(1, 2)}
    if found.v_scale is not None:
        wrong |= {"v": found.v.view(torch.uint8).roll(1, 3).view(found.v.dtype), "v_scale": found.v_scale * 1.05}
    for field, value in wrong.items():
        error, allowed = checks.check_quantize(p, replace(found, **{field: value}))
        assert not error <= allowed, field


def hard(q, k, v, kind):
    """Inputs that eight bits without an exponent may not be enough for."""
    seldom = (torch.arange(q.shape[1]) % 31 == 0)[None, :, None, None]
    return {
        "scores far apart": (3 * q, k, v),
        "large keys": (q, torch.where(seldom, 8 * k, k), v),
        "large values": (q, k, torch.where(seldom, 50 * v, v)),
        "a large key": (q, torch.where(torch.arange(q.shape[1])[None, :, None, None] == 5, 8 * k, k), v),
        "large channels of values": (q, k, torch.where(torch.arange(q.shape[3]) % 16 == 3, 30 * v, v)),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["scores far apart", "large keys", "large values", "a large key", "large channels of values"]
)
def test_hard_inputs_in_integers_alone(kind):
    layout = make_layout("video", grid=VideoGrid(2, 10, 14))
    q, k, v = make_qkv(layout, torch.float16, batch=1, heads=1)
    q, k, v = hard(q, k, v, kind)
    out = attend(q, k, v, layout=layout, options=KernelOptions(backend="triton", quant="int8-int8"))
    # not the lse, an absolute number, which is off by more where scores are larger
    quantized.check(out, None, q, k, v, "int8-int8", layout=layout)


@pytest.fixture(scope="module")
def real():
    """(layout, q, k and v of every layer) of the embedded model, in the last of three steps of one run."""
    from functools import partial

    from videosparse.attach import sparsify, tracker_of
    from videosparse.generation import GenerationRequest
    from videosparse.generation.running import call_arguments, load_pipeline
    from videosparse.processors import DenseProcessor

    sizes = {"num_frames": 9, "height": 64, "width": 64, "steps": 3, "guidance": 1.0, "device": "cpu"}
    settings = GenerationRequest("a red circle bounces", method="dense", **sizes).resolve()
    pipe, _ = load_pipeline(settings)
    sparsify(pipe, DenseProcessor())
    tracker, seen = tracker_of(pipe.transformer), []

    def core(original, q, k, v, plan):
        if tracker.session.clock.index == 2:
            seen.append((plan.layout, *(x.detach().clone() for x in (q, k, v))))
        return original(q, k, v, plan)

    for _, layer in tracker.layers:
        vars(layer)["core"] = partial(core, layer.core)
    pipe(**{**call_arguments(settings), "output_type": "latent"})
    return seen


@pytest.mark.parametrize("quant", quantized.QUANTS)
def test_real_queries_keys_and_values(quant, real):
    for layout, *tensors in (real[0], real[len(real) // 2], real[-1]):
        assert all(x.abs().max() < 1000 for x in tensors), "far from what float16 holds"
        q, k, v = (x.half() for x in tensors)
        out = attend(q, k, v, layout=layout, options=KernelOptions(backend="triton", quant=quant))
        quantized.check(out, None, q, k, v, quant, layout=layout)


def test_zeros_stay_zeros():
    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    q, k, v = (torch.zeros(1, 70, 1, 64, dtype=torch.float16) for _ in range(3))
    for quant in quantized.QUANTS:
        out, lse = attend(q, k, v, layout=layout, return_lse=True, options=KernelOptions(backend="triton", quant=quant))
        assert not out.any()
        torch.testing.assert_close(lse, torch.full_like(lse, 70).log())


def test_lse_merges_disjoint_maps():
    layout = TokenLayout(VideoGrid(1, 10, 20))
    q, k, v = make_qkv(layout, torch.float16, batch=1, heads=1)
    k = quantized.biased(k)
    keep = torch.rand(1, 1, 4, 4) < 0.5
    keep[..., 0, :2] = torch.tensor([True, False])
    parts = []
    for part in (keep, ~keep):
        index = BlockMap(part, (64, 64), 200, 200).index()
        options = KernelOptions(backend="triton", quant="int8")
        parts.append(attend(q, k, v, layout=layout, index=index, return_lse=True, options=options))
    level = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o.float() * (x - level).exp().transpose(1, 2)[..., None] for o, x in parts)
    quantized.check(out, level, q, k, v, "int8", layout=layout)


def test_order_is_only_an_order():
    layout = make_layout("video", grid=SMALL)
    q, k, v = make_qkv(layout, torch.float16, heads=2)
    index = make_map(layout, (64, 64), "per head", heads=2).index()
    options = KernelOptions(backend="triton", quant="int8")
    out = attend(q, k, v, layout=layout, index=index, options=options)
    index.order[:-1] = index.order[:-1].flip(0)
    assert torch.equal(out, attend(q, k, v, layout=layout, index=index, options=options))


def test_no_tokens():
    layout = make_layout("video", grid=SMALL)
    q = torch.zeros(0, layout.length, 2, 64, dtype=torch.float16)
    options = KernelOptions(backend="triton", quant="int8-fp8")
    out, lse = attend(q, q, q, layout=layout, return_lse=True, options=options)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, layout.length)
