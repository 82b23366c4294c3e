"""The kernels of token orders compiled for GPUs that are not there: 16-byte accesses, no spills, nothing reshuffled."""

import re

import pytest

triton = pytest.importorskip("triton")

from test_compile import resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.kernels import triton_forward, triton_norm  # noqa: E402
from videosparse.kernels.triton_order import choose_warps, next_power, reorder_kernel  # noqa: E402

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90, 100])
FP32 = ("cos_ptr", "sin_ptr", "lse_ptr")
INT32 = ("table_ptr", "row_ptr", "order_ptr", "lens_ptr")


def compile_kernel(kernel, constants, capability, warps, dtype="bf16", stages=3):
    """With strides and pointers as aligned as in a real call."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer, stride = name.endswith("_ptr"), name.startswith("stride")
        kind = "*fp32" if name in FP32 else "*i32" if name in INT32 else "*i16" if name == "ids_ptr" else f"*{dtype}"
        signature[name] = kind if pointer else "i64" if stride else "fp32" if name in ("eps", "scale_log2") else "i32"
        if stride or (pointer and name not in ("sin_ptr", "ids_ptr", *INT32[1:])):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_streams(compiled, tmp_path):
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    assert not re.search(r"(ld|st)\.global\.b16", ptx)  # element by element
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 112, used  # at least four programs of four warps on one multiprocessor


@CAPABILITIES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(40, 128), (24, 128), (12, 64)])
def test_reorder(capability, inverse, heads, dim, tmp_path):
    part = 1 << (heads.bit_length() - 1)
    constants = {"HEADS": heads, "DIM": dim, "PAD": dim, "PART": part, "REST": next_power(heads - part)}
    compiled = compile_kernel(reorder_kernel, constants | {"INVERSE": inverse}, capability, choose_warps(heads, dim, 2))
    assert_streams(compiled, tmp_path)
    assert "convert_layout" not in compiled.asm["ttgir"]
    assert not re.search(r"muli %\w+, %stride_\w+ : i32", compiled.asm["ttir"])  # offsets are 64-bit


@CAPABILITIES
@pytest.mark.parametrize(
    ("heads", "across", "rotary"), [(40, True, 1), (12, True, 1), (24, False, 1), (24, False, 2)]
)  # fmt: skip
def test_norm_rotate(capability, heads, across, rotary, tmp_path):
    work = triton_norm.choose_work(heads, 128)
    constants = {
        "HEADS": heads, "DIM": 128, "PAD": 128, "PART": work.part, "REST": work.rest, "ACROSS": across,
        "ROTARY": rotary, "STRIDE_PAIR": 2 if rotary == 1 else 1, "GAP": False, "SPLIT": False, "ORDER": True,
    }  # fmt: skip
    compiled = compile_kernel(triton_norm.norm_rotate_kernel, constants, capability, work.warps)
    assert_streams(compiled, tmp_path)
    assert set(re.findall(r"convert_layout .* : tensor<(\d+)x", compiled.asm["ttgir"])) <= {"1"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "block"), [(128, (128, 128)), (64, (64, 64))])
def test_portable_attention(capability, head_dim, block, tmp_path):
    tiles = triton_forward.choose_tiles(head_dim, triton_forward.torch.bfloat16, block[0], 163)
    constants = {
        "HEAD_DIM": head_dim, "HEAD_PAD": head_dim, "BLOCK_ROWS": block[0], "BLOCK_COLS": block[1],
        "TILE_M": tiles.rows, "TILE_N": tiles.keys, "SPARSE": True, "HAS_LENS": True, "NEED_LSE": True,
        "STAGES": tiles.stages, "ORDER": True, "FAR": False,
    }  # fmt: skip
    compiled = compile_kernel(
        triton_forward.forward_kernel, constants, capability, tiles.warps, stages=tiles.stages
    )  # fmt: skip
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert not re.search(r"st\.global\.b16", compiled.asm["ptx"])
