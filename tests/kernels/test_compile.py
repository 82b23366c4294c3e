"""The Triton kernel compiled for GPUs that are not there: tensor cores, no spills, shared memory, aligned loads."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from sass import disassemble, spilled_in_loops  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.kernels import triton_sums  # noqa: E402
from videosparse.kernels.triton_common import head_pad  # noqa: E402
from videosparse.kernels.triton_forward import choose_tiles, forward_kernel  # noqa: E402

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KB = {80: 163, 86: 99, 90: 227, 100: 227}
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_forward(
    capability, dtype, head_dim, block, *, sparse=True, lens=True, lse=True, far=False, order=False, ids="*i16"
):
    """The kernel for one card, with all strides and pointers aligned as in a real call."""
    rows = block[0] if sparse else 128
    tiles = choose_tiles(head_dim, DTYPES[dtype], rows, SHARED_KB[capability])
    if not sparse:
        block = (tiles.rows, tiles.keys)
    constants = {
        "HEAD_DIM": head_dim, "HEAD_PAD": head_pad(head_dim), "BLOCK_ROWS": block[0], "BLOCK_COLS": block[1],
        "TILE_M": tiles.rows, "TILE_N": tiles.keys, "SPARSE": sparse, "HAS_LENS": lens, "NEED_LSE": lse,
        "STAGES": tiles.stages, "ORDER": order, "FAR": far,
    }  # fmt: skip
    if not order:
        constants |= {"table_ptr": None}
    if not sparse:
        constants |= {"row_ptr": None, "ids_ptr": None, "order_ptr": None}
    if not lens:
        constants |= {"lens_ptr": None}
    signature, attributes = {}, {}
    for i, name in enumerate(forward_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr"):
            signature[name] = "*fp32" if name == "lse_ptr" else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = "i64"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            kind = ids if name == "ids_ptr" else "*i32" if "ptr" in name else "i32"
            signature[name] = "fp32" if name in ("scale_log2", "far_alpha") else kind
    source = ASTSource(forward_kernel, signature, constants, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, tmp_path):
    """Registers, spilled bytes and the like of a compiled kernel, as cuobjdump names them."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [BINARIES / "cuobjdump", "-res-usage", path]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found.stdout)}


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize(("head_dim", "block"), [(128, (128, 128)), (64, (128, 64)), (128, (64, 64))])
def test_half_precision_uses_tensor_cores_within_the_card(capability, head_dim, block, tmp_path):
    compiled = compile_forward(capability, "bf16", head_dim, block)
    assert TENSOR_CORES[capability] in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert "ld.global.b16" not in compiled.asm["ptx"]  # element by element
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


@pytest.mark.parametrize("capability", [80, 90])
def test_short_ids_are_copied_ahead_as_long_ones_are(capability):
    """cp.async copies words of four bytes at least: loaded as halves, ids would take the stages of the keys."""
    short, long = (compile_forward(capability, "bf16", 128, (128, 128), ids=ids) for ids in ("*i16", "*i32"))
    assert short.metadata.shared == long.metadata.shared
    count = [len(re.findall(r"cp\.async\.c[ag]\S* ", x.asm["ptx"])) for x in (short, long)]
    assert count[0] == count[1] > 0


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_single_precision_fits(capability, head_dim, tmp_path):
    compiled = compile_forward(capability, "fp32", head_dim, (128, 128))
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense_fits(head_dim, tmp_path):
    for capability in (86, 90, 100):
        compiled = compile_forward(capability, "fp16", head_dim, (128, 128), sparse=False, lens=False, lse=False)
        assert TENSOR_CORES[capability] in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
        used = resources(compiled, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, used


@pytest.mark.parametrize("head_dim", [12, 96])
def test_padded_heads_fit(head_dim):
    compiled = compile_forward(86, "bf16", head_dim, (64, 128))
    assert TENSOR_CORES[86] in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KB[86] * 1024


def test_offsets_are_64_bit():
    ttir = compile_forward(80, "bf16", 128, (128, 128)).asm["ttir"]
    kinds = {k for k in re.findall(r"arith\.muli %\w+, %stride_\w+ : (\S+)", ttir)}
    assert kinds == {"i64"}
    # rows of tokens times their stride: [rows, 1] products are all 64-bit
    columns = re.findall(r"arith\.muli .* : (tensor<\d+x1x\w+>)", ttir)
    assert columns
    assert all(kind.endswith("xi64>") for kind in columns)


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "sparse", "order"), [
    (90, "bf16", 128, True, False), (90, "bf16", 128, False, False), (90, "bf16", 128, True, True),
    (80, "bf16", 128, True, False), (80, "fp16", 64, True, False),
])  # fmt: skip
def test_changed_scores_fit(capability, dtype, head_dim, sparse, order, tmp_path):
    compiled = compile_forward(capability, dtype, head_dim, (128, 128), sparse=sparse, lse=False, far=True, order=order)
    assert TENSOR_CORES[capability] in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


def compile_sums(capability, dtype, head_dim, block, *, lens=True, far=False):
    """The kernel of block sums for one card, aligned as in a real call."""
    tiles = triton_sums.choose_tiles(head_dim, DTYPES[dtype], block, SHARED_KB[capability])
    constants = {
        "HEAD_DIM": head_dim, "HEAD_PAD": head_pad(head_dim), "UNIT_M": tiles.unit, "TILE_M": tiles.rows,
        "TILE_N": tiles.keys, "HAS_LENS": lens, "STAGES": tiles.stages, "ORDER": False, "FAR": far, "table_ptr": None,
    }  # fmt: skip
    if not lens:
        constants |= {"lens_ptr": None}
    signature, attributes = {}, {}
    for i, name in enumerate(triton_sums.sums_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "lse_ptr", "sums_ptr"):
            signature[name] = f"*{dtype}" if name in ("q_ptr", "k_ptr") else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = "i64"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "far_alpha") else "*i32" if "ptr" in name else "i32"
    source = ASTSource(triton_sums.sums_kernel, signature, constants, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize(("dtype", "head_dim", "block"), [
    ("bf16", 128, (128, 128)), ("fp16", 64, (64, 64)), ("bf16", 96, (128, 64)), ("fp32", 128, (64, 128)),
])  # fmt: skip
def test_block_sums_fit(capability, dtype, head_dim, block, tmp_path):
    compiled = compile_sums(capability, dtype, head_dim, block)
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert dtype == "fp32" or TENSOR_CORES[capability] in compiled.asm["ptx"]


@pytest.mark.parametrize(("dtype", "head_dim", "block"), [("bf16", 128, (128, 64)), ("fp32", 128, (64, 128))])
def test_block_sums_of_changed_scores_fit(dtype, head_dim, block, tmp_path):
    used = resources(compile_sums(90, dtype, head_dim, block, far=True), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


def test_block_sums_of_two_programs_fit_a_multiprocessor(tmp_path):
    """One multiplies while the other exponentiates."""
    compiled = compile_sums(90, "bf16", 128, (128, 128), lens=False)
    assert 2 * compiled.metadata.shared <= 227 * 1024
    assert 2 * 256 * resources(compiled, tmp_path)["REG"] <= 65536


@pytest.mark.parametrize(("dtype", "head_dim", "block"), [
    ("bf16", 128, (128, 128)), ("bf16", 128, (64, 64)), ("fp16", 64, (128, 64)), ("bf16", 64, (64, 128)),
])  # fmt: skip
@pytest.mark.parametrize("lens", [False, True])
def test_block_sums_for_hopper(dtype, head_dim, block, lens, tmp_path):
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from videosparse.kernels.hopper_sums import hopper_sums_kernel

    constants = {"D": head_dim, "UNIT_M": block[0], "UNIT_N": block[1], "HAS_LENS": lens}
    swizzled = repr(NVMMASharedLayout(128, 16, 4))
    kinds = {
        "q_desc": f"tensordesc<{dtype}[1, 1, 64, {head_dim}],{swizzled}>",
        "k_desc": f"tensordesc<{dtype}[1, 1, 128, {head_dim}],{swizzled}>",
        "lse_ptr": "*fp32", "sums_ptr": "*fp32", "lens_ptr": "*i32" if lens else "*fp32", "scale": "fp32",
    }  # fmt: skip
    names = hopper_sums_kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    source = GluonASTSource(hopper_sums_kernel, signature, constants, {})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "setmaxnreg" in ptx
    assert compiled.metadata.shared <= SHARED_KB[90] * 1024
    used = resources(compiled, tmp_path)
    assert used["LOCAL"] == 0, used
    # a few words may wait in local memory around the loops, in which the groups have no register left
    assert used["STACK"] <= 64, used
    assert spilled_in_loops(disassemble("nvdisasm", tmp_path), 4) == []
