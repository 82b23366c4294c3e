"""The profile of a step: which part a kernel belongs to, traces, and a tiny run on a CPU."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from videosparse.benchmark.kernel_names import PARTS, RULES, UNKNOWN, Work, part_of
from videosparse.benchmark.profiling import sums, trace, works
from videosparse.benchmark.step_tables import parts
from videosparse.cases import MODELS

ROOT = Path(__file__).parents[2]

SDPA, CUDNN = "aten::_scaled_dot_product_cudnn_attention", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"
LONG, SHORT = (1, 40, 75600, 128), (1, 40, 512, 128)


@pytest.mark.parametrize(
    ("work", "part"),
    [
        (Work("forward_kernel", 1, ("videosparse::attend_forward",)), "self-attention"),
        (Work("forward_kernel", 1), "self-attention"),
        (Work("cutlass_kernel_flash", 1, ("videosparse::dense_by_library",)), "self-attention"),
        (Work("queries_kernel", 1, ("videosparse::attend_forward",)), "rounding for integer attention"),
        (Work("int8_kernel", 1, ("videosparse::attend_forward",)), "self-attention"),
        (Work(CUDNN, 1, (SDPA,), (LONG, LONG, LONG)), "self-attention"),
        (Work(CUDNN, 1, (SDPA,), (LONG, SHORT, SHORT)), "cross-attention"),
        (Work("hopper_sums_kernel", 1, ("videosparse::block_sums",)), "search and lists"),
        (Work("reorder_kernel", 1, ("videosparse::reorder",)), "token order"),
        (Work("norm_rotate_kernel", 1, ("videosparse::norm_rotate",)), "norm and rotation of queries and keys"),
        (Work("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 1, ("aten::addmm", "aten::linear")), "linear layers"),
        (Work("sm90_xmma_gemm_bf16bf16_bf16f32", 1), "linear layers"),
        (Work("void cutlass::device_kernel<enable_3x_kernel", 1, ("aten::_scaled_mm",)), "linear layers"),
        (Work("triton_red_fused__to_copy_abs_amax_clamp_div_3", 1), "rounding for FP8 linears"),
        (Work("triton_poi_fused_addmm_gelu_view_5", 1), "activations"),
        (Work("triton_red_fused__to_copy_add_mul_native_layer_norm_0", 1), "norms, modulation, residuals"),
        (Work("triton_poi_fused__to_copy_add_mul_7", 1), "norms, modulation, residuals"),
        (
            Work("vectorized_elementwise_kernel<4, F>", 1, ("aten::mul",), ((1, 75600, 5120), (1, 1, 5120))),
            "norms, modulation, residuals",
        ),
        (
            Work("elementwise_kernel<128, 2>", 1, ("aten::mul",), ((1, 75600, 40, 64), (1, 75600, 1, 64))),
            "norm and rotation of queries and keys",
        ),
        (Work("Memcpy DtoD (Device -> Device)", 1), "copies"),
        (Work("void cub::DeviceRadixSortOnesweepKernel", 1, ("aten::sort",)), "search and lists"),
        (Work("a kernel nobody knows", 1), UNKNOWN),
    ],
)  # fmt: skip
def test_kernels_by_name_and_operation(work, part):
    assert part_of(work) == part


def test_rules_lead_to_known_parts():
    assert {part for part, _ in RULES} <= {*PARTS, "attention"}
    assert len(set(RULES)) == len(RULES)


def test_a_block_on_the_cpu_falls_into_its_parts():
    """Real operations, as torch.profiler names them here."""
    torch.manual_seed(0)
    x, text = torch.randn(1, 96, 256), torch.randn(1, 32, 256)
    weight = torch.randn(256, 256)

    def block():
        normed = F.layer_norm(x, (256,)) * 1.5 + 0.5
        q, k = (F.rms_norm(normed @ weight, (256,)).view(1, 96, 2, 128) for _ in range(2))
        turned = torch.empty_like(q)
        turned[..., 0::2] = q[..., 0::2] * 0.5 - q[..., 1::2]
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (turned, k, q)))
        other = text.view(1, 32, 2, 128).transpose(1, 2)
        out = out + F.scaled_dot_product_attention(q.transpose(1, 2), other, other)
        return F.gelu(F.linear(out.transpose(1, 2).reshape(1, 96, 256), weight)) + x

    found = works(trace(block, torch.device("cpu")))
    ops = {work.name: part_of(work) for work in found}
    assert ops["aten::mm"] == "linear layers"
    assert ops["aten::native_layer_norm"] == "norms, modulation, residuals"
    assert ops["aten::gelu"] == "activations"
    attention = {
        part_of(work) for work in found if work.name.startswith("aten::_scaled_dot_product") and len(work.shapes) >= 3
    }
    assert attention == {"self-attention", "cross-attention"}
    seconds = {name: took for name, took, _, _ in sums(found, part_of)}
    assert sum(seconds.values()) == pytest.approx(sum(work.seconds for work in found))
    assert seconds["norm and rotation of queries and keys"] > 0
    assert seconds.get(UNKNOWN, 0.0) < 0.2 * sum(seconds.values())


def test_kernels_get_the_operations_around_them():
    ops = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::linear", "tid": 1, "ts": 0, "dur": 10, "args": {"External id": 1}},
        {
            "ph": "X", "cat": "cpu_op", "name": "aten::addmm", "tid": 1, "ts": 2, "dur": 5,
            "args": {"External id": 2, "Input Dims": [[8], [4, 8], [[1], [2]], []]},
        },
        {"ph": "X", "cat": "user_annotation", "name": "step", "tid": 1, "ts": 0, "dur": 20},
    ]  # fmt: skip
    kernels = [
        {"ph": "X", "cat": "kernel", "name": "nvjet", "ts": 30, "dur": 7, "args": {"External id": 2}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 40, "dur": 3, "args": {}},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "ts": 30, "dur": 20, "args": {"External id": 1}},
    ]
    assert works({"traceEvents": ops + kernels}) == [
        Work("nvjet", 7e-6, ("aten::addmm", "aten::linear"), ((8,), (4, 8))),
        Work("Memcpy DtoH", 3e-6),
    ]
    assert [(w.name, round(1e6 * w.seconds)) for w in works({"traceEvents": ops})] == [
        ("aten::linear", 5), ("aten::addmm", 5),
    ]  # fmt: skip


def test_a_tiny_run_and_its_table_and_picture(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("profile_step", ROOT / "eval" / "profile_step.py")
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program
    spec.loader.exec_module(program)
    monkeypatch.setitem(MODELS, "wan2.1-1.3b", dataclasses.replace(MODELS["wan2.1-1.3b"], heads=2, ffn=64))
    path = tmp_path / "profile.csv"
    arguments = ["--case", "wan2.1-1.3b 32x32x5", "--layers", "2", "--output", str(path)]
    assert program.main([*arguments, "--only", "stock", "radial-eager"]) == 0
    assert program.main([*arguments, "--only", "stock"]) == 0  # replaces its rows
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for name in ("stock", "radial-eager"):
        own = [r for r in rows if r["contender"] == name]
        assert len({r["part"] for r in own}) == len(own)
        assert {"self-attention", "cross-attention", "linear layers", "between kernels"} <= {r["part"] for r in own}
        assert sum(float(r["share"]) for r in own) == pytest.approx(100, abs=1)
    assert float(next(r["density"] for r in rows if r["contender"] == "radial-eager")) <= 1
    ((case, head, lines),) = parts(rows)
    assert case == "wan2.1-1.3b 32x32x5"
    assert head == ["ms a layer", "radial-eager", "stock"]
    assert lines[0][0] == "self-attention"
    assert any(line[0] == "a layer" for line in lines)
    figure = tmp_path / "figures" / "profile.png"
    assert program.main(["--plot", "--output", str(path), "--figure", str(figure)]) == 0
    assert figure.stat().st_size > 1000
    with pytest.raises(SystemExit):
        program.main([*arguments, "--only", "adaspa"])
    assert "adaspa has steps of several kinds" in capsys.readouterr().err


def test_the_table_lists_what_is_unknown():
    common = {"case": "x", "contender": "dense", "layer_ms": "10", "share": "50"}
    rows = [
        {**common, "part": "linear layers", "ms": "5", "longest": "gemm"},
        {**common, "part": UNKNOWN, "ms": "5", "longest": "odd_kernel 5.00 ms x1"},
    ]
    ((_, _, lines),) = parts(rows)
    assert ["unknown in dense: odd_kernel 5.00 ms x1", ""] in lines
