"""The forward kernel that stock Triton specializes for Hopper, compiled for it without one."""

import re

import pytest

triton = pytest.importorskip("triton")

from sass import disassemble  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.kernels import specialized_forward  # noqa: E402


def compile_forward(dtype, *, sparse, masked, lse):
    """The kernel with aligned pointers; on strides it is not specialised."""
    kernel = specialized_forward.specialized_kernel
    constants = {
        "BLOCK": specialized_forward.BLOCK, "HEAD_DIM": specialized_forward.HEAD_DIM,
        "STAGES": specialized_forward.STAGES, "SPARSE": sparse, "MASKED": masked, "NEED_LSE": lse,
    }  # fmt: skip
    constants |= {} if sparse else dict.fromkeys(("row_ptr", "ids_ptr", "order_ptr"))
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr"):
            signature[name] = "*fp32" if name == "lse_ptr" else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = "i64"
        else:
            signature[name] = "fp32" if name == "scale_log2" else "*i32" if "ptr" in name else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4, "num_stages": specialized_forward.STAGES, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_is_specialized(dtype, sparse, masked, tmp_path):
    """Triton drops the specialization without a word when it does not like a kernel."""
    compiled = compile_forward(dtype, sparse=sparse, masked=masked, lse=sparse)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "setmaxnreg" in ptx
    assert compiled.metadata.shared <= 227 * 1024
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    used = disassemble("cuobjdump", "-res-usage", tmp_path)
    assert "STACK:0 " in used, used
    assert "LOCAL:0 " in used, used


def test_offsets_are_64_bit():
    ttir = compile_forward("bf16", sparse=True, masked=True, lse=True).asm["ttir"]
    assert set(re.findall(r"arith\.muli %\w+, %stride_\w+ : (\S+)", ttir)) == {"i64"}
