"""The Hopper kernel of integer attention without a Hopper GPU: its source on the CPU, compiled for sm_90."""

import re
from itertools import pairwise

import pytest
import torch
from inputs import LAYOUTS, MAP_SHARES, PoisonedEmpty, assert_same_of_both_ids, make_layout, make_map, make_qkv

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

import gluon_on_cpu  # noqa: E402
import quantized  # noqa: E402
from sass import disassemble, multiplying_loops, spilled_in_loops  # noqa: E402
from test_hopper import clean_tail  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.language import NVMMASharedLayout  # noqa: E402

from videosparse.blocks import BlockMap  # noqa: E402
from videosparse.kernels import KernelOptions, attend, backend, gpu, hopper_int8, hopper_work, int8_path  # noqa: E402
from videosparse.kernels import hopper_int8_kernel as kernel_module  # noqa: E402
from videosparse.kernels import hopper_int8_softmax as softmax_module  # noqa: E402
from videosparse.kernels.call import AttentionCall, Lists  # noqa: E402
from videosparse.layout import TokenLayout, VideoGrid  # noqa: E402

QUANTS = ["int8", "int8-fp8"]


@pytest.fixture
def on_cpu(monkeypatch):
    """`attend(backend="triton")` launches the kernel as plain Python, with three programs."""
    kernel = gluon_on_cpu.Kernel("int8_kernel", softmax_module, kernel_module)
    monkeypatch.setattr(hopper_int8, "_tiles", gluon_on_cpu.describe_tiles)
    monkeypatch.setattr(hopper_int8, "describe", gluon_on_cpu.describe)
    monkeypatch.setattr(hopper_work, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(hopper_int8, "compiled", lambda *_, **__: kernel)
    monkeypatch.setattr(hopper_work, "value_tail", clean_tail)
    monkeypatch.setattr(hopper_int8, "FP8_HEAD_DIMS", (64, 128))
    monkeypatch.setattr(hopper_int8, "quantize", quantized.quantize)
    monkeypatch.setattr(gpu, "is_hopper", lambda device: True)
    monkeypatch.setattr(int8_path, "has_fp8", lambda device: True)
    monkeypatch.setattr(backend, "missing", lambda *_: None)
    monkeypatch.setattr("videosparse.kernels.triton_int8.forward", None)  # must not be reached
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


def run_and_check(quant, layout, block_map, q, k, v, lse=True, limit=None, lse_limit=0.05):
    index = None if block_map is None else block_map.index()
    options = KernelOptions(backend="triton", quant=quant)
    got = attend(q, k, v, layout=layout, index=index, return_lse=lse, options=options)
    out, level = got if lse else (got, None)
    quantized.check(out, level, q, k, v, quant, layout=layout, block_map=block_map, limit=limit, lse_limit=lse_limit)
    assert out.is_contiguous()
    # the same numbers are multiplied in plain torch, where only the weights are not rounded
    plain = attend(q, k, v, layout=layout, index=index, options=KernelOptions(backend="torch", quant=quant))
    assert (out - plain).float().norm() <= (0.006 if quant == "int8" else 0.035) * plain.float().norm()


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("dim", "block"), [(128, (128, 128)), (128, (128, 64)), (64, (128, 64))])
def test_lists(on_cpu, quant, kind, dim, block):
    layout = make_layout(kind).aligned(block)
    run_and_check(quant, layout, make_map(layout, block, heads=2), *make_qkv(layout, torch.bfloat16, heads=2, dim=dim))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_dense(on_cpu, quant, kind, aligned):
    layout = make_layout(kind)
    layout = layout.aligned((128, 128)) if aligned else layout
    run_and_check(quant, layout, None, *make_qkv(layout, torch.float16, heads=2, dim=64))


def test_ids_of_both_sizes_give_the_same(on_cpu, monkeypatch):
    layout = make_layout("ragged text").aligned((128, 64))
    q, k, v = make_qkv(layout, torch.bfloat16, heads=2)
    options = KernelOptions(backend="triton", quant="int8")
    call = lambda x: attend(q, k, v, layout=layout, index=x, options=options)  # noqa: E731
    assert_same_of_both_ids(call, make_map(layout, (128, 64), "per head", heads=2), monkeypatch)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("share", MAP_SHARES)
def test_shared_maps_and_strides(on_cpu, quant, share):
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.bfloat16, view="fused")
    run_and_check(quant, layout, make_map(layout, (128, 64), share), q, quantized.biased(k), v, lse=False)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", ["video", "ragged text"])
def test_maxima_that_grow(on_cpu, quant, kind):
    layout = make_layout(kind)
    q, k, v = make_qkv(layout, torch.bfloat16, heads=2, dim=128)
    k = quantized.growing(k)
    run_and_check(quant, layout, None, q, k, v, limit=0.2, lse_limit=quantized.lse_limit(q, k))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("tokens", [1, 127, 129])
def test_few_tokens(on_cpu, quant, tokens):
    layout = TokenLayout(VideoGrid(1, 1, tokens))
    for block_map in (None, BlockMap.full(layout, (128, 64))):
        q, k, v = make_qkv(layout, torch.bfloat16, batch=1, heads=2)
        out, lse = attend(
            q, k, v, layout=layout, index=block_map and block_map.index(), return_lse=True,
            options=KernelOptions(backend="triton", quant=quant),
        )  # fmt: skip
        quantized.check(out, lse, q, k, v, quant, layout=layout, block_map=block_map, limit=0.06)


def test_nan_of_tokens_shows(on_cpu):
    layout = make_layout("ragged text").aligned((128, 128))
    for position in range(3):
        q, k, v = make_qkv(layout, torch.bfloat16)
        (q, k, v)[position][0, 3, 1, 5] = torch.nan
        for quant in QUANTS:
            out = attend(q, k, v, layout=layout, options=KernelOptions(backend="triton", quant=quant))
            assert out[0, 3, 1].isnan().any()
            assert not out[1].isnan().any()


def compile_int8(head_dim, keys, fp8, sparse=True, text=True, lse=True, dtype="bf16"):
    """The kernel as its launcher compiles it."""
    constants = {
        "KEYS": keys, "HEAD_DIM": head_dim, "SPARSE": sparse, "TEXT": text, "FP8": fp8, "NEED_LSE": lse,
    }  # fmt: skip
    values = (f"fp8e4nv[1,1,{head_dim},{keys}]", (keys, 8, 4)) if fp8 else (f"{dtype}[1,1,{keys},64]", (128, 16, 4))
    descriptors = {
        "q_desc": (f"i8[1,1,64,{head_dim}]", (head_dim, 8, 4)),
        "q_scale_desc": ("fp32[1,1,64]", (0, 32, 3)),
        "k_desc": (f"i8[1,1,{keys},{head_dim}]", (head_dim, 8, 4)),
        "k_scale_desc": ("fp32[1,1,1,32]", (0, 32, 4)),
        "v_desc": values,
        "tail_desc": values,
        "out_desc": (f"{dtype}[1,1,64,{head_dim}]", (128, 16, 4)),
    }
    signature = {}
    for name in kernel_module.int8_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in descriptors:
            tile, layout = descriptors[name]
            signature[name] = f"tensordesc<{tile},{NVMMASharedLayout(*layout)!r}>"
        elif name.endswith("_ptr"):
            kind = "*i16" if name == "ids_ptr" else "*i32"
            signature[name] = "*fp32" if name in ("lse_ptr", "v_scale_ptr") else kind
        else:
            signature[name] = "i32"
    source = GluonASTSource(kernel_module.int8_kernel, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})


# text takes ptxas long: with lists at one head_dim, without at the other
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "keys", "sparse", "text"),
    [(128, 128, True, False), (64, 128, True, False), (128, 64, True, True), (64, 128, False, True)],
)
def test_compiles_for_hopper(fp8, head_dim, keys, sparse, text, tmp_path):
    compiled = compile_int8(head_dim, keys, fp8, sparse, text, lse=text)
    ptx = compiled.asm["ptx"]
    assert "m64n128k32.s32.s8.s8" in ptx
    assert (".f32.e4m3.e4m3" if fp8 else ".f32.bf16.bf16") in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "setmaxnreg.inc" in ptx
    assert compiled.metadata.shared <= 227 * 1024
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    used = disassemble("cuobjdump", "-res-usage", tmp_path)
    assert "LOCAL:0 " in used
    # some words may wait in local memory around the loops; masked tiles, which are few, read column numbers there
    assert int(re.search(r"STACK:(\d+)", used)[1]) <= 256, used
    sass = disassemble("nvdisasm", tmp_path)
    assert not fp8 or scores_are_alone(sass)
    spilled = spilled_in_loops(sass, 2)
    assert not any("STL" in x for x in spilled), spilled
    assert len(spilled) <= (40 if text else 0)


@pytest.mark.parametrize("fp8", [False, True])
def test_few_instructions(fp8, tmp_path):
    compiled = compile_int8(128, 128, fp8, text=False, lse=False)
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    for loop in multiplying_loops(disassemble("nvdisasm", tmp_path), 2):
        assert sum("VIMNMX" in x for x in loop) < 40  # 63 without the instruction that takes three
        if not fp8:  # over the products with factors that are 1
            (vote,) = (i for i, x in enumerate(loop) if "VOTE" in x)
            jump = next(i for i, x in enumerate(loop) if i > vote and "BRA" in x)
            assert sum("FMUL" in x for x in loop[jump : jump + 70]) >= 64


def scores_are_alone(sass):
    """Whether every integer product is waited for before one with fp8 values starts."""
    steps = re.findall(r"(IGMMA|QGMMA|WARPGROUP\.DEPBAR\.LE gsb0, 0x0)", sass)
    waited = [before for before, after in pairwise(steps) if after == "QGMMA" and before != "QGMMA"]
    return len(waited) >= 4 and not any(before == "IGMMA" for before in waited)


def call(lists=None, seq_lens=None, video=256, text_start=256):
    return AttentionCall(lists, seq_lens, video, text_start, 0.1)


def lists(block):
    return Lists(torch.empty(0), torch.empty(0), torch.empty(0), block, 1, 1)


@pytest.mark.parametrize(
    ("v", "given", "values", "reason"),
    [
        (torch.zeros(1, 256, 2, 64).half(), call(lists((64, 64))), "fp8", r"128 query rows \(got 64\)"),
        (torch.zeros(1, 256, 2, 65).half()[..., :64], call(), None, "multiples of 16 bytes"),
        (torch.zeros(1, 256, 2, 65).half()[..., :64], call(), "fp8", None),
        (torch.zeros(1, 20000, 1, 64).half(), call(text_start=300), None, "128 key blocks of text"),
        (torch.zeros(1, 256, 2, 128).bfloat16(), call(lists((128, 64))), None, None),
        (torch.zeros(1, 256, 2, 128).bfloat16(), call(lists((128, 64))), "int8", "no int8 values"),
    ],
)
def test_what_it_does_not_take(v, given, values, reason, monkeypatch):
    if values == "fp8":
        assert r"head_dim 128 (got 64)" in hopper_int8.unsuited(v, v, v, given, False, values)
        monkeypatch.setattr(hopper_int8, "FP8_HEAD_DIMS", (64,))
    found = hopper_int8.unsuited(v, v, v, given, False, values)
    assert found is None if reason is None else re.search(reason, found)
