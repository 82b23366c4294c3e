"""Integer attention compiled for GPUs that are not there: integer tensor cores, no spills, shared memory."""

import re

import pytest
from test_compile import SHARED_KB, resources

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.kernels import quantize, triton_int8  # noqa: E402

SHARED = SHARED_KB | {89: 99, 100: 227}
INT8 = {
    80: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    86: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    89: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    90: "k32.s32.s8.s8",
    100: r"kind::i8|s32.s8.s8",  # Triton 3.6 takes the older instruction
}
VALUES = {None: "*bf16", "fp8": "*fp8e4nv", "int8": "*i8"}
FP8 = {89: "f32.e4m3.e4m3", 90: "f32.e4m3.e4m3", 100: "kind::f8f6f4"}


def compiled_for(capability, kernel, constants, types, options):
    """A kernel with aligned pointers of the types, and aligned strides."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types or name.startswith("stride"):
            signature[name] = types.get(name, "i64")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = "*i16" if name == "ids_ptr" else "*i32" if "ptr" in name else "i32"
            signature[name] = "fp32" if name == "scale_log2" else kind
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_attention(capability, head_dim, block, values, sparse=True):
    tiles = triton_int8.choose_tiles(head_dim, block[0], SHARED[capability], values is not None)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_ROWS": block[0], "BLOCK_COLS": block[1], "TILE_N": tiles.keys,
        "SCALED": quantize.SCALED_KEYS, "COPIES": quantize.COPIES, "SPARSE": sparse, "HAS_LENS": True,
        "FP8": values == "fp8", "INT8": values == "int8", "NEED_LSE": True, "STAGES": tiles.stages,
    }  # fmt: skip
    constants |= {} if sparse else {"row_ptr": None, "ids_ptr": None, "order_ptr": None}
    constants |= {} if values else {"v_scale_ptr": None}
    types = {
        "q_ptr": "*i8", "k_ptr": "*i8", "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
        "v_ptr": VALUES[values], "out_ptr": "*bf16", "lse_ptr": "*fp32",
    }  # fmt: skip
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return compiled_for(capability, triton_int8.int8_kernel, constants, types, options)


@pytest.mark.parametrize(("capability", "values"), [
    (80, None), (80, "int8"), (86, None), (86, "int8"), (89, "fp8"), (90, None), (90, "fp8"), (90, "int8"),
    (100, "fp8"),
])  # fmt: skip
@pytest.mark.parametrize(("head_dim", "block"), [(128, (128, 128)), (128, (64, 64)), (64, (128, 64))])
def test_tensor_cores_without_spills(capability, values, head_dim, block, tmp_path):
    compiled = compile_attention(capability, head_dim, block, values)
    assert re.search(INT8[capability], compiled.asm["ptx"])
    assert values != "fp8" or FP8[capability] in compiled.asm["ptx"]
    if values == "int8":  # both products, and no other
        assert not re.search(r"mma\S*\.f32\.(bf16|f16|e4m3|tf32)", compiled.asm["ptx"])
    assert compiled.metadata.shared <= SHARED[capability] * 1024
    used = resources(compiled, tmp_path)
    # a word or two outside the loop
    assert used["STACK"] <= 16, used
    assert used["LOCAL"] == 0, used


def test_dense_fits(tmp_path):
    compiled = compile_attention(86, 128, (128, 64), None, sparse=False)
    assert re.search(INT8[86], compiled.asm["ptx"])
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


@pytest.mark.parametrize("values", [None, "fp8", "int8"])
def test_offsets_are_64_bit(values):
    ttir = compile_attention(90, 128, (128, 128), values).asm["ttir"]
    assert {k for k in re.findall(r"arith\.muli %\w+, %stride_\w+ : (\S+)", ttir)} <= {"i64"}
    # what a line of samples and heads is multiplied by
    assert re.search(r"arith\.muli %line\w*, .* : i64", ttir)


PASS = {
    "statistics_kernel": (
        {"HEAD_DIM": 128, "ROWS": 512, "PART": 64, "HAS_LENS": True, "VALUES": True},
        {"k_ptr": "*bf16", "v_ptr": "*bf16", "sum_ptr": "*fp32", "peak_ptr": "*fp32"},
    ),
    "statistics_kernel of few": (
        {"HEAD_DIM": 128, "ROWS": 128, "PART": 128, "HAS_LENS": True, "VALUES": True},
        {"k_ptr": "*bf16", "v_ptr": "*bf16", "sum_ptr": "*fp32", "peak_ptr": "*fp32"},
    ),
    "totals_kernel": (
        {"HEAD_DIM": 128, "ROWS": 512, "PART": 64, "DIMS": 32, "TILE": 128, "HAS_LENS": True, "VALUES": True},
        {"sum_ptr": "*fp32", "peak_ptr": "*fp32", "mean_ptr": "*fp32", "v_scale_ptr": "*fp32"},
    ),
    "queries_kernel": (
        {"HEAD_DIM": 128, "ROWS": 64, "HAS_LENS": True, "NEED_LSE": True},
        {"q_ptr": "*bf16", "mean_ptr": "*fp32", "out_ptr": "*i8", "scale_ptr": "*fp32", "lse_ptr": "*fp32"},
    ),
    "keys_kernel": (
        {"HEAD_DIM": 128, "ROWS": 64, "COPIES": 32, "HAS_LENS": True},
        {"k_ptr": "*bf16", "mean_ptr": "*fp32", "out_ptr": "*i8", "scale_ptr": "*fp32"},
    ),
    "values_kernel": (
        {"HEAD_DIM": 128, "ROWS": 128, "HAS_LENS": True, "REORDER": True, "INT8": False},
        {"v_ptr": "*bf16", "v_scale_ptr": "*fp32", "out_ptr": "*fp8e4nv"},
    ),
    "values_kernel of int8": (
        {"HEAD_DIM": 128, "ROWS": 64, "HAS_LENS": True, "REORDER": False, "INT8": True},
        {"v_ptr": "*bf16", "v_scale_ptr": "*fp32", "out_ptr": "*i8"},
    ),
}


@pytest.mark.parametrize("name", PASS)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_pass_reads_and_writes_16_bytes_at_a_time(name, capability, tmp_path):
    if name == "values_kernel" and capability < 89:
        pytest.skip("no FP8")
    kernel = name.split()[0]
    options = {"num_warps": 8 if kernel == "statistics_kernel" else 4}
    compiled = compiled_for(capability, getattr(quantize, kernel), *PASS[name], options)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert kernel in ("statistics_kernel", "totals_kernel") or "st.global.v4.b32" in compiled.asm["ptx"]
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
