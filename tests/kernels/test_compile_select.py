"""The kernels of the search compiled for GPUs that are not there: no spills, shared memory, one warp by itself."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.blocks import SELECTION_LIMIT  # noqa: E402
from videosparse.kernels import triton_sampled, triton_select  # noqa: E402
from videosparse.kernels.triton_common import SHARED_KB as CARDS  # noqa: E402
from videosparse.kernels.triton_common import head_pad  # noqa: E402
from videosparse.kernels.triton_sums import choose_tiles  # noqa: E402

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = [80, 86, 90, 100]
SHARED_KB = {c: CARDS.get(divmod(c, 10), 99) for c in CAPABILITIES}
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    "sums_ptr": "*fp32", "lse_ptr": "*fp32", "kept_ptr": "*fp32", "counts_ptr": "*i32", "bits_ptr": "*u8",
    "row_ptr": "*i32", "ids_ptr": "*i16", "lens_ptr": "*i32",
}  # fmt: skip


def compile_kernel(kernel, capability, constants, dtype="bf16", **options):
    """A kernel for one card, with all strides and tensors aligned as in a real call."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr"):
            signature[name] = f"*{dtype}"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name.startswith("stride"):
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if name in ("scale_log2", "far_alpha") else "i32"
        aligned = name.startswith("stride") or ("ptr" in name and name not in ("lens_ptr", "row_ptr"))
        if aligned and name not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_sampled(capability, dtype, head_dim, block, sample, lens=True, far=False):
    tiles = choose_tiles(head_dim, DTYPES[dtype], block, SHARED_KB[capability])
    constants = {
        "HEAD_DIM": head_dim, "HEAD_PAD": head_pad(head_dim), "BLOCK_M": block[0], "SAMPLE": sample,
        "TILE_M": tiles.rows, "TILE_N": tiles.keys, "HAS_LENS": lens, "STAGES": tiles.stages, "FAR": far,
    }  # fmt: skip
    if not lens:
        constants["lens_ptr"] = None
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return compile_kernel(triton_sampled.sampled_kernel, capability, constants, dtype, **options)


def resources(compiled, tmp_path):
    """Registers, spilled bytes and the like of a compiled kernel, as cuobjdump names them."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [BINARIES / "cuobjdump", "-res-usage", path]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found.stdout)}


def assert_fits(compiled, capability, tmp_path):
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    return used


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("columns", [5, 591, 1182, 4096, 7200, SELECTION_LIMIT])
@pytest.mark.parametrize("kernel", ["keep_largest_kernel", "expand_kernel"])
def test_rows_stay_in_registers(kernel, capability, columns, tmp_path):
    pad = triton_select.choose_pad(columns)
    warps = triton_select.choose_warps(pad)
    compiled = compile_kernel(getattr(triton_select, kernel), capability, {"PAD": pad}, num_warps=warps)
    assert_fits(compiled, capability, tmp_path)
    if warps == 1 and pad >= 256 and kernel == "keep_largest_kernel":  # a row is counted by one instruction
        assert "redux.sync" in compiled.asm["ptx"]


def test_offsets_are_64_bit():
    for kernel in (triton_select.keep_largest_kernel, triton_select.expand_kernel):
        ttir = compile_kernel(kernel, 80, {"PAD": 2048}, num_warps=1).asm["ttir"]
        assert re.search(r"arith\.muli .* : i64", ttir)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("sample", [8, 16, 32])
@pytest.mark.parametrize(("head_dim", "block"), [(128, (128, 64)), (128, (64, 64)), (128, (128, 128)), (64, (128, 64))])
def test_half_precision_uses_tensor_cores_within_the_card(capability, sample, head_dim, block, tmp_path):
    compiled = compile_sampled(capability, "bf16", head_dim, block, sample)
    assert TENSOR_CORES[capability] in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert "ld.global.b16" not in compiled.asm["ptx"]  # element by element
    assert_fits(compiled, capability, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_single_precision_fits(capability, head_dim, tmp_path):
    compiled = compile_sampled(capability, "fp32", head_dim, (128, 64), 16, lens=False)
    assert_fits(compiled, capability, tmp_path)
    assert "tf32" not in compiled.asm["ptx"]


def test_sampled_offsets_are_64_bit():
    ttir = compile_sampled(80, "bf16", 128, (128, 64), 16).asm["ttir"]
    kinds = re.findall(r"arith\.muli %\w+, %(?:stride_\w+|columns\w*) : (\S+)", ttir)
    assert len(kinds) >= 4
    assert set(kinds) == {"i64"}


def test_sampled_sums_of_changed_scores_fit(tmp_path):
    assert_fits(compile_sampled(90, "bf16", 128, (128, 64), 16, far=True), 90, tmp_path)
