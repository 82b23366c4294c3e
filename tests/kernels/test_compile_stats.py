"""The kernel of block statistics compiled for GPUs that are not there."""

import pytest

pytest.importorskip("triton")

from test_compile import DTYPES, SHARED_KB, TENSOR_CORES, resources
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from videosparse.kernels import triton_stats
from videosparse.kernels.triton_common import head_pad


def compile_stats(capability, dtype, head_dim, block, *, lens=False, far=False):
    """The kernel for one card, aligned as in a real call."""
    tiles = triton_stats.choose_tiles(head_dim, DTYPES[dtype], block, SHARED_KB[capability])
    constants = {
        "HEAD_DIM": head_dim, "HEAD_PAD": head_pad(head_dim), "UNIT_M": tiles.unit, "TILE_M": tiles.rows,
        "TILE_N": tiles.keys, "HAS_LENS": lens, "STAGES": tiles.stages, "ORDER": far, "FAR": far,
    }  # fmt: skip
    constants |= {} if lens else {"lens_ptr": None}
    constants |= {} if far else {"table_ptr": None}
    signature, attributes = {}, {}
    for i, name in enumerate(triton_stats.stats_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "lse_ptr", "stats_ptr"):
            signature[name] = f"*{dtype}" if name in ("q_ptr", "k_ptr") else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = "i64"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "plane":
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if name in ("scale", "eps", "far_alpha") else "*i32" if "ptr" in name else "i32"
    source = ASTSource(triton_stats.stats_kernel, signature, constants, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize(("dtype", "head_dim", "block"), [
    ("bf16", 128, (64, 64)), ("fp16", 64, (128, 64)), ("bf16", 128, (128, 128)), ("fp32", 64, (64, 64)),
])  # fmt: skip
def test_block_stats_fit(capability, dtype, head_dim, block, tmp_path):
    compiled = compile_stats(capability, dtype, head_dim, block, lens=capability == 80)
    assert compiled.metadata.shared <= SHARED_KB[capability] * 1024
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert dtype == "fp32" or TENSOR_CORES[capability] in compiled.asm["ptx"]


def test_block_stats_of_changed_scores_fit(tmp_path):
    used = resources(compile_stats(90, "bf16", 128, (64, 64), far=True), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
