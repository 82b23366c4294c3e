"""The backward kernels compiled for GPUs that are not there; see test_compile.py."""

import re

import pytest

triton = pytest.importorskip("triton")

from sass import disassemble, spilled_in_loops  # noqa: E402
from test_compile import DTYPES, SHARED_KB, TENSOR_CORES, resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.kernels import hopper_backward, triton_backward  # noqa: E402
from videosparse.kernels.triton_common import head_pad  # noqa: E402

LISTS = ("row_ptr", "ids_ptr", "order_ptr")
HALF = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
SINGLE = ("level_ptr", "delta_ptr", "lse_ptr", "grad_lse_ptr")


def compile_for(capability, kernel, dtype, constants, warps, stages):
    """A kernel with aligned pointers, and with aligned strides where it is specialised on strides."""
    signature, attributes = {}, {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in HALF + SINGLE:
            signature[name] = "*fp32" if name in SINGLE else f"*{dtype}"
            attributes[(i,)] = aligned
        elif name.startswith("stride"):
            signature[name] = "i64"
            if kernel not in (hopper_backward.query_kernel, hopper_backward.key_kernel):
                attributes[(i,)] = aligned
        else:
            kind = "*i16" if name == "ids_ptr" else "*i32" if "ptr" in name else "i32"
            signature[name] = "fp32" if name.startswith("scale") else kind
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def constants_for(tiles, head_dim, block, *, sparse=True, lens=True, **more):
    constants = {
        "HEAD_DIM": head_dim, "HEAD_PAD": head_pad(head_dim), "BLOCK_ROWS": block[0], "BLOCK_COLS": block[1],
        "TILE_M": tiles.rows, "TILE_N": tiles.keys, "SPARSE": sparse, "HAS_LENS": lens, "STAGES": tiles.stages, **more,
    }  # fmt: skip
    if not sparse:
        constants |= dict.fromkeys(LISTS)
    if not lens:
        constants |= {"lens_ptr": None}
    return constants


def compile_portable(capability, dtype, head_dim, block, **kwargs):
    """The query and the key kernel."""
    sparse = kwargs.get("sparse", True)
    chosen = triton_backward.choose_tiles(head_dim, DTYPES[dtype], block, SHARED_KB[capability], sparse=sparse)
    for kernel, tiles in zip((triton_backward.query_kernel, triton_backward.key_kernel), chosen, strict=True):
        own = block if sparse else (tiles.rows, tiles.keys)
        constants = constants_for(tiles, head_dim, own, **kwargs)
        yield compile_for(capability, kernel, dtype, constants, tiles.warps, tiles.stages)


def compile_hopper(dtype, head_dim, block, **kwargs):
    """(tiles, compiled) of the query and of the key kernel."""
    chosen = hopper_backward.choose_tiles(head_dim, block)
    kernels = hopper_backward.query_kernel, hopper_backward.key_kernel
    for kernel, tiles, more in zip(kernels, chosen, ({"BOUND": True}, {}), strict=True):
        own = block if kwargs.get("sparse", True) else (tiles.rows, tiles.keys)
        constants = constants_for(tiles, head_dim, own, SPECIALIZE=tiles.specialize, **more, **kwargs)
        constants["HEAD_PAD"] = 64 if head_dim <= 64 else 128
        yield tiles, compile_for(90, kernel, dtype, constants, tiles.warps, tiles.stages)


def assert_fits(compiled, capability, tmp_path):
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["LOCAL"] == 0, used
    # on Blackwell two words may wait in local memory around the loop, in which nothing is spilled
    assert used["STACK"] <= (8 if capability == 100 else 0), used
    assert not used["STACK"] or spilled_in_loops(disassemble("nvdisasm", tmp_path), 1) == []


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize(("head_dim", "block"), [(128, (128, 128)), (64, (128, 64)), (64, (64, 128)), (128, (64, 64))])
def test_half_precision_uses_tensor_cores_within_the_card(capability, head_dim, block, tmp_path):
    for compiled in compile_portable(capability, "bf16", head_dim, block):
        assert TENSOR_CORES[capability] in compiled.asm["ptx"]
        assert "cp.async" in compiled.asm["ptx"]
        assert "ld.global.b16" not in compiled.asm["ptx"]  # element by element
        assert_fits(compiled, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_single_precision_fits(capability, head_dim, tmp_path):
    for compiled in compile_portable(capability, "fp32", head_dim, (128, 128)):
        assert_fits(compiled, capability, tmp_path)
        assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense_fits(head_dim, tmp_path):
    for capability in (86, 90):
        for compiled in compile_portable(capability, "fp16", head_dim, (128, 128), sparse=False, lens=False):
            assert TENSOR_CORES[capability] in compiled.asm["ptx"]
            assert_fits(compiled, capability, tmp_path)


@pytest.mark.parametrize("head_dim", [12, 96])
def test_padded_heads_fit(head_dim):
    for compiled in compile_portable(86, "bf16", head_dim, (64, 128)):
        assert TENSOR_CORES[86] in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_KB[86] * 1024


def test_offsets_are_64_bit():
    for compiled in compile_portable(80, "bf16", 128, (128, 128)):
        ttir = compiled.asm["ttir"]
        kinds = set(re.findall(r"arith\.muli %\w+, %stride_\w+ : (\S+)", ttir))
        assert kinds == {"i64"}
        # rows of tokens times their stride: [rows, 1] products are all 64-bit
        columns = re.findall(r"arith\.muli .* : (tensor<\d+x1x\w+>)", ttir)
        assert columns
        assert all(kind.endswith("xi64>") for kind in columns)


def test_preparation_fits(tmp_path):
    constants = {"HEAD_DIM": 128, "HEAD_PAD": 128, "TILE": 64, "HAS_LENS": True, "HAS_GRAD_LSE": True}
    for capability in (80, 86, 90, 100):
        assert_fits(
            compile_for(capability, triton_backward.prepare_kernel, "bf16", constants, 4, 3), capability, tmp_path
        )


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 128), (64, 64)])
def test_hopper_is_specialized_where_a_program_owns_128_rows(head_dim, block, tmp_path):
    """Triton drops the specialization without a word when it does not like a kernel."""
    for tiles, compiled in compile_hopper("bf16", head_dim, block):
        ptx = compiled.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert "cp.async.bulk.tensor" in ptx
        assert ("setmaxnreg" in ptx) == tiles.specialize
        assert_fits(compiled, 90, tmp_path)


def test_dense_hopper_is_specialized(tmp_path):
    for _, compiled in compile_hopper("fp16", 128, (128, 128), sparse=False, lens=False):
        assert "setmaxnreg" in compiled.asm["ptx"]
        assert_fits(compiled, 90, tmp_path)


def test_hopper_offsets_are_64_bit():
    for _, compiled in compile_hopper("bf16", 128, (128, 128)):
        kinds = re.findall(r"arith\.muli %\w+, %stride_\w+ : (\S+)", compiled.asm["ttir"])
        assert set(kinds) == {"i64"}
