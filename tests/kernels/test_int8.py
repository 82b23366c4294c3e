"""Integer attention by `attend`: in plain torch against fp64, what it refuses, and that it compiles."""

import logging

import pytest
import quantized
import torch
from inputs import BLOCKS, LAYOUTS, make_layout, make_map, make_qkv
from orders import CODES

from videosparse.kernels import KernelOptions, attend, block_sums, int8_path
from videosparse.kernels.backend import choose
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import TokenOrder

LAYOUT = TokenLayout(VideoGrid(2, 6, 8))


def options(quant, backend="torch"):
    return KernelOptions(backend=backend, quant=quant)


def spiky(v):
    """Values with a few large channels."""
    return v * torch.where(torch.rand(v.shape[2:]) < 0.1, 30.0, 1.0).to(v.dtype)


@pytest.mark.parametrize("quant", quantized.QUANTS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("inputs", ["normal", "biased keys", "large values"])
@pytest.mark.parametrize("sparse", [True, False])
def test_is_near_to_fp64(quant, kind, inputs, sparse):
    layout = make_layout(kind).aligned((128, 64))
    q, k, v = make_qkv(layout, torch.bfloat16, view="fused")
    k = quantized.biased(k) if inputs == "biased keys" else k
    v = spiky(v) if inputs == "large values" else v
    block_map = make_map(layout, (128, 64), "per head") if sparse else None
    index = block_map.index() if block_map else None
    out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=options(quant))
    quantized.check(out, lse, q, k, v, quant, layout=layout, block_map=block_map)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_smoothing_is_what_biased_keys_need():
    q, k, v = make_qkv(LAYOUT, torch.float16, batch=1, heads=1)
    k = k + 30 * torch.randn(64).half()
    out = attend(q, k, v, layout=LAYOUT, options=options("int8"))
    quantized.check(out, None, q, k, v, "int8", layout=LAYOUT)
    rounded = (k.float() / (k.abs().max() / 127)).round() * (k.abs().max() / 127)
    rough = attend(q.float(), rounded, v.float(), layout=LAYOUT)
    with pytest.raises(AssertionError):
        quantized.check(rough, None, q, k, v, "int8", layout=LAYOUT)


def test_scales_for_64_keys_are_what_large_values_need():
    layout = TokenLayout(VideoGrid(2, 12, 16))
    q, k, v = make_qkv(layout, torch.float16, batch=1, heads=2)
    v[:, ::97] *= 50
    truth = attend(q.double(), k.double(), v.double(), layout=layout)
    out = attend(q, k, v, layout=layout, options=options("int8-int8"))
    assert (out - truth).norm() <= 0.03 * truth.norm()
    step = v.float().abs().amax(1, keepdim=True) / 127
    of_all_keys = attend(q.float(), k.float(), (v / step).round() * step, layout=layout)
    assert (of_all_keys - truth).norm() > 1.3 * (out - truth).norm(), "though nothing else is rounded"


@pytest.mark.parametrize("block", BLOCKS)
def test_full_map_is_dense(block):
    layout = make_layout("ragged text").aligned(block)
    q, k, v = make_qkv(layout, torch.float16)
    index = make_map(layout, block, density=2.0).index()
    out = attend(q, k, v, layout=layout, index=index, options=options("int8"))
    dense = attend(q, k, v, layout=layout, options=options("int8"))
    rows = torch.arange(layout.length) // block[0] != 1  # that row of the map is empty
    torch.testing.assert_close(out[:, rows], dense[:, rows], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("quant", quantized.QUANTS)
@pytest.mark.parametrize("sparse", [True, False])
def test_token_orders(quant, sparse):
    layout = make_layout("ragged text").aligned((64, 64))
    order = TokenOrder(layout.grid, CODES)
    q, k, v = make_qkv(layout, torch.float16, heads=6)
    call = {"layout": layout, "options": options(quant), "return_lse": True}
    call["index"] = make_map(layout, (64, 64), "per head", heads=6).index() if sparse else None
    plain, plain_lse = attend(q, k, v, **call)
    out, lse = attend(q, k, v, **call, order=order)
    assert torch.equal(out, order.restore(plain, layout))
    assert torch.equal(lse, order.restore(plain_lse.transpose(1, 2)[..., None], layout)[..., 0].transpose(1, 2))


def test_repeats_to_the_bit():
    q, k, v = make_qkv(LAYOUT, torch.float16)
    first, second = (attend(q, k, v, layout=LAYOUT, options=options("int8-fp8")) for _ in range(2))
    assert torch.equal(first, second)


def test_block_sums_ignore_it():
    q, k, v = make_qkv(LAYOUT, torch.float16)
    _, lse = attend(q, k, v, layout=LAYOUT, return_lse=True)
    found = block_sums(q, k, lse, layout=LAYOUT, block=(64, 64), options=options("int8"))
    assert torch.equal(found, block_sums(q, k, lse, layout=LAYOUT, block=(64, 64), options=KernelOptions()))


def test_refuses_gradients():
    q, k, v = (x.requires_grad_() for x in make_qkv(LAYOUT, torch.float16))
    with pytest.raises(NotImplementedError, match=r'quant="int8" is for inference: it has no gradient'):
        attend(q, k, v, layout=LAYOUT, options=options("int8"))
    with torch.no_grad():
        attend(q, k, v, layout=LAYOUT, options=options("int8"))


@pytest.mark.parametrize(
    ("dtype", "dim", "backend", "error", "message"),
    [
        (torch.float32, 64, "auto", TypeError, r"takes float16 and bfloat16 \(got torch.float32\)"),
        (torch.float64, 64, "torch", TypeError, r"takes float16 and bfloat16 \(got torch.float64\)"),
        (torch.float16, 96, "auto", ValueError, r"takes head_dim 64 and 128 \(got 96\); use quant=None"),
        (torch.float16, 64, "triton", RuntimeError, 'backend="triton" cannot run here'),
    ],
)
def test_refuses(dtype, dim, backend, error, message):
    q = torch.zeros(1, 96, 1, dim, dtype=dtype)
    with pytest.raises(error, match=message):
        attend(q, q, q, layout=LAYOUT, options=options("int8", backend))


def test_fp8_needs_its_tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr("videosparse.kernels.ops.choose", lambda *_: "triton")
    int8_path.has_fp8.cache_clear()
    assert not int8_path.has_fp8(torch.device("cuda", 3))
    q = torch.zeros(1, 96, 1, 64).half()
    with pytest.raises(RuntimeError, match=r'needs FP8 tensor cores, compute capability 8.9 .* use "int8-int8"'):
        attend(q, q, q, layout=LAYOUT, options=options("int8-fp8"))
    assert choose("torch", q.device, q.dtype) == "torch"


def test_says_once_what_runs(caplog):
    int8_path._tell.cache_clear()
    q = torch.zeros(1, 96, 1, 64).half()
    with caplog.at_level(logging.INFO, logger="videosparse"):
        for _ in range(3):
            attend(q, q, q, layout=LAYOUT, options=options("int8"))
    assert [r.getMessage() for r in caplog.records] == [
        'attend computes quant="int8" in plain torch on cpu, which is not faster.'
    ]


@pytest.mark.slow
def test_compiles_without_a_break():
    layout = make_layout("text")
    index = make_map(layout, (64, 64)).index()
    q, k, v = make_qkv(layout, torch.float16)

    def twice(q, k, v):
        out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=options("int8"))
        return out * 2, lse

    out, lse = torch.compile(twice, fullgraph=True)(q, k, v)
    expected, expected_lse = twice(q, k, v)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert torch.equal(lse, expected_lse)
