"""The kernel of `norm_rotate` compiled for GPUs that are not there: 16-byte accesses, no spills, nothing reshuffled."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from norms import FORMS, make_problem

from videosparse.layout import VideoGrid

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from videosparse.kernels import triton_norm  # noqa: E402
from videosparse.kernels.norm_op import MAX_WIDTH  # noqa: E402
from videosparse.kernels.triton_norm import choose_work, next_power, norm_rotate_kernel  # noqa: E402

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ACROSS, HEAD = True, False
NONE, SHARED, OWN = 0, 1, 2
MODELS = {
    "wan 14B": (40, ACROSS, SHARED), "wan 1.3B": (12, ACROSS, SHARED), "wan 5B": (24, ACROSS, SHARED),
    "hunyuan": (24, HEAD, SHARED), "mochi": (24, HEAD, OWN), "text": (24, HEAD, NONE),
}  # fmt: skip


def compile_norm(capability, dtype, heads, across, rotary, dim=128, *, split=False, aligned=True):
    """The kernel for one card, by default with strides and pointers as aligned as in a real call.

    Shared angles come as every other element of what a transformer passes, a head's own one after another.
    """
    work = choose_work(heads, dim)
    constants = {
        "HEADS": heads, "DIM": dim, "PAD": next_power(dim), "PART": work.part, "REST": work.rest, "ACROSS": across,
        "ROTARY": rotary, "STRIDE_PAIR": 2 if rotary == SHARED else 1, "GAP": rotary == NONE, "SPLIT": split,
        "ORDER": False, "table_ptr": None,
    }  # fmt: skip
    if rotary == NONE:
        constants |= {"cos_ptr": None, "sin_ptr": None}
    signature, attributes = {}, {}
    for i, name in enumerate(norm_rotate_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in ("cos_ptr", "sin_ptr") else f"*{dtype}"
            # sin starts at the second element where angles come twice
            attributes[(i,)] = aligned and not (name == "sin_ptr" and rotary == SHARED)
        elif name.startswith("stride"):
            signature[name] = "i64"
            attributes[(i,)] = aligned
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    attributes = {place: [["tt.divisibility", 16]] for place, whether in attributes.items() if whether}
    source = ASTSource(norm_rotate_kernel, signature, constants, attributes)
    options = {"num_warps": work.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, tmp_path):
    """Registers, spilled bytes and the like of a compiled kernel, as cuobjdump names them."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [BINARIES / "cuobjdump", "-res-usage", path]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found.stdout)}


def assert_streams(compiled):
    """16 bytes at a time, and nothing reshuffled but the angles of one token, which few threads may load for all."""
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    assert not re.search(r"(ld|st)\.global\.b16", ptx)  # element by element
    assert set(re.findall(r"convert_layout .* : tensor<(\d+)x", compiled.asm["ttgir"])) <= {"1"}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_real_models_stay_in_registers(capability, split, model, tmp_path):
    compiled = compile_norm(capability, "bf16", *MODELS[model], split=split)
    assert_streams(compiled)
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 96, used  # at least five programs of four warps on one multiprocessor


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("across", [ACROSS, HEAD])
def test_other_precisions_fit(dtype, across, tmp_path):
    used = resources(compile_norm(90, dtype, 40, across, SHARED), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 80), (64, 128), (21, 96), (128, 128), (64, 256)])
def test_any_width_fits(capability, heads, dim, tmp_path):
    assert heads * dim <= MAX_WIDTH
    used = resources(compile_norm(capability, "bf16", heads, ACROSS, OWN, dim), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


def test_unaligned_strides_compile():
    assert "ld.global.b16" in compile_norm(90, "bf16", 3, ACROSS, SHARED, aligned=False).asm["ptx"]


def test_offsets_are_64_bit():
    ttir = compile_norm(80, "bf16", 24, HEAD, OWN).asm["ttir"]
    kinds = re.findall(r"arith\.muli %\w+, %stride_\w+ : (\S+)", ttir)
    assert len(kinds) >= 5
    assert set(kinds) == {"i64"}


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12, 24, 40, 48, 63, 64])
def test_parts_hold_all_heads(heads):
    work = choose_work(heads, 128)
    assert heads <= work.part + work.rest < 2 * heads
    assert all(n & (n - 1) == 0 for n in (work.part, work.rest, work.warps))
    assert 1 <= work.warps <= 8


DEVICE = 99  # of no GPU, so that nothing compiled here is ever launched


class Driver:
    """Triton's driver for a card that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def made(monkeypatch):
    """Kernels that launches have asked for: compiled, not run."""
    compiled, run = [], type(norm_rotate_kernel).run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    monkeypatch.setattr(type(norm_rotate_kernel), "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return compiled


@pytest.mark.parametrize("form", FORMS)
def test_what_is_launched_is_what_was_looked_at(form, made):
    """The alignment that Triton finds in real arguments, strided views of angles included; no recompiles."""

    def launch(grid, gap, batch, text):
        problem = make_problem(form, torch.bfloat16, heads=24, dim=128, grid=grid, gap=gap, batch=batch, text=text)
        triton_norm.forward(*problem.streams(), problem.turn_views(), 24, problem.layout.text_start)
        return len(norm_rotate_kernel.device_caches[DEVICE][0])

    before = launch(VideoGrid(1, 3, 5), 2, 2, 3)
    assert len(made) == (1 if form.startswith("wan") else 2)
    for compiled in made:
        assert_streams(compiled)
    for sizes in [(VideoGrid(1, 4, 4), 1, 1, 16), (VideoGrid(2, 3, 4), 128, 3, 7)]:
        assert launch(*sizes) == before
