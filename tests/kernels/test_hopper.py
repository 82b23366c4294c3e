"""The Hopper kernel without a Hopper GPU: its source run on the CPU, compiled for sm_90, and when it is taken."""

import logging
import math
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from inputs import (
    LAYOUTS,
    MAP_SHARES,
    PoisonedEmpty,
    assert_accurate,
    assert_same_of_both_ids,
    make_layout,
    make_map,
    make_qkv,
)
from orders import check_attend

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

import gluon_on_cpu  # noqa: E402
from sass import disassemble, spilled_in_loops  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.language import NVMMASharedLayout  # noqa: E402

from videosparse.blocks import BlockMap  # noqa: E402
from videosparse.kernels import (  # noqa: E402
    KernelOptions,
    attend,
    backend,
    describe_backend,
    gpu,
    hopper_forward,
    hopper_work,
    torch_order,
)
from videosparse.kernels.call import AttentionCall, Lists  # noqa: E402
from videosparse.kernels.hopper_kernel import forward_kernel  # noqa: E402
from videosparse.layout import TokenLayout, VideoGrid, ceil_div  # noqa: E402

GPU = torch.device("cuda", 0)


def clean_tail(v, lens, first, video, text_start):
    """`value_tail` in plain torch."""
    position = torch.arange(first, v.shape[1])
    token = (position < video) | ((position >= text_start) & (position < lens[:, None]))
    return v[:, first:].masked_fill(~token[:, :, None, None], 0).contiguous()


def take_the_hopper_kernel(monkeypatch):
    """As if the current device, whatever it is, were of sm_90."""
    monkeypatch.setattr(gpu, "is_hopper", lambda device: True)


@pytest.fixture
def on_cpu(monkeypatch):
    """`attend(backend="triton")` launches the kernel as plain Python, with three programs."""
    kernel = gluon_on_cpu.Kernel()
    monkeypatch.setattr(hopper_forward, "describe", gluon_on_cpu.describe)
    monkeypatch.setattr(hopper_work, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(hopper_forward, "compiled", lambda *_, **__: kernel)
    monkeypatch.setattr(hopper_work, "value_tail", clean_tail)
    take_the_hopper_kernel(monkeypatch)
    monkeypatch.setattr(backend, "missing", lambda *_: None)
    monkeypatch.setattr("videosparse.kernels.triton_forward.forward", None)  # must not be reached
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


def run_and_check(layout, block_map, q, k, v, lse=True):
    index = None if block_map is None else block_map.index()
    got = attend(q, k, v, layout=layout, index=index, return_lse=lse, options=KernelOptions(backend="triton"))
    out, level = got if lse else (got, None)
    assert_accurate(out, level, q, k, v, layout=layout, block_map=block_map)
    assert out.is_contiguous()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("dim", "block"), [(128, (128, 128)), (128, (128, 64)), (64, (128, 128)), (64, (128, 64))])
def test_lists(on_cpu, kind, dim, block):
    layout = make_layout(kind).aligned(block)
    run_and_check(layout, make_map(layout, block, heads=2), *make_qkv(layout, torch.bfloat16, heads=2, dim=dim))


@pytest.mark.parametrize("kind", ["video", "ragged text"])
def test_ids_of_both_sizes_give_the_same(on_cpu, monkeypatch, kind):
    layout = make_layout(kind).aligned((128, 64))
    q, k, v = make_qkv(layout, torch.bfloat16, heads=2)
    call = lambda x: attend(q, k, v, layout=layout, index=x, options=KernelOptions(backend="triton"))  # noqa: E731
    assert_same_of_both_ids(call, make_map(layout, (128, 64), "per head", heads=2), monkeypatch)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_dense(on_cpu, kind, aligned):
    layout = make_layout(kind)
    layout = layout.aligned((128, 128)) if aligned else layout
    run_and_check(layout, None, *make_qkv(layout, torch.float16, heads=2, dim=64))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["fused", "head-major"])
def test_shared_maps_and_strides(on_cpu, share, view):
    layout = make_layout("video")
    run_and_check(layout, make_map(layout, (128, 64), share), *make_qkv(layout, torch.bfloat16, view=view), lse=False)


@pytest.mark.parametrize("block", [(128, 128), (128, 64)])
def test_text_that_shares_a_block_with_video(on_cpu, block):
    layout = make_layout("ragged text")
    run_and_check(layout, make_map(layout, block), *make_qkv(layout, torch.bfloat16))


@pytest.mark.parametrize("block", [None, (128, 128), (128, 64)])
def test_long_text_whose_end_differs(on_cpu, block):
    grid = VideoGrid(2, 7, 9)
    lens = torch.tensor([grid.tokens + 500, grid.tokens + 3], dtype=torch.int32)
    layout = TokenLayout(grid, 600, seq_lens=lens)
    layout = layout.aligned(block) if block else layout
    block_map = make_map(layout, block, "per sample and head", heads=2) if block else None
    run_and_check(layout, block_map, *make_qkv(layout, torch.bfloat16, heads=2))


@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_few_tokens(on_cpu, tokens):
    layout = TokenLayout(VideoGrid(1, 1, tokens))
    for block_map in (None, BlockMap.full(layout, (128, 64))):
        run_and_check(layout, block_map, *make_qkv(layout, torch.bfloat16, batch=1, heads=2))


def test_long_rows_and_a_nearly_empty_map(on_cpu):
    layout = TokenLayout(VideoGrid(1, 40, 40))
    rows = ceil_div(layout.length, 128)
    keep = torch.eye(rows, dtype=torch.bool).repeat(1, 2, 1, 1)
    keep[:, :, 5] = True
    keep[:, 0, 3] = True
    keep[:, 1, 7] = False
    for kept, batch, heads in ((keep, 1, 2), (keep[:, :1], 2, 1)):
        block_map = BlockMap(kept, (128, 128), 1600, 1600)
        run_and_check(layout, block_map, *make_qkv(layout, torch.bfloat16, batch=batch, heads=heads))


def test_rows_of_valid_tokens_let_nan_through(on_cpu):
    layout = make_layout("ragged text").aligned((128, 128))
    q, k, v = make_qkv(layout, torch.bfloat16)
    q[0, 3] = torch.nan
    out = attend(q, k, v, layout=layout, options=KernelOptions(backend="triton"))
    assert out[0, 3].isnan().all()
    assert not out[0, 4].isnan().any()


def test_the_stand_in_notices_what_is_not_waited_for(monkeypatch, on_cpu):
    hasty = SimpleNamespace(**vars(gluon_on_cpu.STAND_INS["mbarrier"]) | {"wait": gluon_on_cpu.nothing})
    monkeypatch.setitem(gluon_on_cpu.STAND_INS, "mbarrier", hasty)
    kernel = gluon_on_cpu.Kernel()
    monkeypatch.setattr(hopper_forward, "compiled", lambda *_, **__: kernel)
    read = gluon_on_cpu.read_tile
    monkeypatch.setattr(gluon_on_cpu, "read_tile", lambda *place: (time.sleep(0.05), read(*place))[1])
    threads = threading.active_count()
    layout = TokenLayout(VideoGrid(1, 30, 40))
    with pytest.raises(AssertionError):
        run_and_check(layout, None, *make_qkv(layout, torch.bfloat16, batch=1, heads=1))
    assert threading.active_count() == threads, "a late copy would fail in the next launch"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("dim", "block"), [(128, (128, 64)), (64, (128, 128)), (64, None)])
def test_token_orders(on_cpu, monkeypatch, kind, dim, block):
    layout = make_layout(kind)
    layout = layout.aligned(block) if block else layout
    block_map = make_map(layout, block, heads=3) if block else None
    check_attend(layout, block_map, *make_qkv(layout, torch.bfloat16, dim=dim), KernelOptions(backend="triton"))


def test_more_tokens_than_the_kernel_divides_are_copied(on_cpu, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_ORDERED", 269)
    monkeypatch.setattr(
        "videosparse.kernels.ops.move", lambda x, steps, inverse, _: torch_order.reorder(x, steps, inverse)
    )
    layout = make_layout("video")
    check_attend(layout, None, *make_qkv(layout, torch.bfloat16), KernelOptions(backend="triton"))


def compile_forward(dtype, head_dim, keys, sparse=True, text=True, lse=True, order=False, ids="*i16"):
    """The kernel as its launcher compiles it."""
    constants = {"KEYS": keys, "HEAD_DIM": head_dim, "SPARSE": sparse, "TEXT": text, "NEED_LSE": lse, "ORDER": order}
    constants |= {} if order else {"out_ptr": None, "table_ptr": None, "ordered": None}
    blocks = {"q_desc": (64, head_dim), "out_desc": (64, head_dim)}
    signature, attributes = {}, {}
    for i, name in enumerate(forward_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            rows, columns = blocks.get(name, (keys, 64))
            signature[name] = f"tensordesc<{dtype}[1,1,{rows},{columns}],{NVMMASharedLayout(128, 16, 4)!r}>"
        elif name == "out_ptr":
            signature[name] = f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr"):
            signature[name] = {"lse_ptr": "*fp32", "ids_ptr": ids}.get(name, "*i32")
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
    source = GluonASTSource(forward_kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize(("keys", "sparse"), [(128, True), (64, True), (128, False)])
@pytest.mark.parametrize("text", [True, False])
def test_compiles_for_hopper(dtype, head_dim, keys, sparse, text, tmp_path):
    compiled = compile_forward(dtype, head_dim, keys, sparse, text, lse=text)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "setmaxnreg.inc" in ptx
    assert compiled.metadata.shared <= 227 * 1024
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    used = disassemble("cuobjdump", "-res-usage", tmp_path)
    assert "LOCAL:0 " in used
    # a few words may wait in local memory around the loops: arguments that later roles read
    assert int(re.search(r"STACK:(\d+)", used)[1]) <= 32, used
    assert spilled_in_loops(disassemble("nvdisasm", tmp_path), 2) == []


@pytest.mark.parametrize(("head_dim", "keys", "text"), [(128, 128, False), (128, 64, True), (64, 128, True)])
def test_rows_in_order_leave_16_bytes_at_a_time(head_dim, keys, text, tmp_path):
    compiled = compile_forward("bf16", head_dim, keys, True, text, lse=text, order=True)
    stores = re.findall(r"st\.global\.\S+", compiled.asm["ptx"])
    assert stores.count("st.global.v4.b32") == 2 * 64 * head_dim // 128 // 8
    assert not any("b16" in store for store in stores)
    assert compiled.metadata.shared <= 227 * 1024
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    used = disassemble("cuobjdump", "-res-usage", tmp_path)
    assert "LOCAL:0 " in used
    assert "STACK:0 " in used, used
    assert spilled_in_loops(disassemble("nvdisasm", tmp_path), 2) == []


def test_offsets_are_64_bit():
    ir = compile_forward("bf16", 128, 128).asm["ttgir"]
    # the offset of a head's lse, and pointers into lists that are added to one by one
    assert re.search(r"arith\.muli .* : i64", ir)
    assert "tt.addptr" in ir
    assert all(kind in ("i32", "i64") for kind in re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", ir))


@pytest.mark.parametrize("text", [True, False])
def test_short_ids_cost_no_registers(text, tmp_path):
    """Ids of both sizes are widened as they are loaded: the same products and copies, by as many registers."""
    facts = []
    for ids, load in (("*i16", "LDG.E.U16 "), ("*i32", "LDG.E ")):
        compiled = compile_forward("bf16", 128, 64, True, text, lse=text, ids=ids)
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        used, sass = disassemble("cuobjdump", "-res-usage", tmp_path), disassemble("nvdisasm", tmp_path)
        assert load in sass
        assert spilled_in_loops(sass, 2) == []
        facts.append((re.findall(r"(?:REG|STACK|SHARED):\d+", used), sass.count("HGMMA"), sass.count("UTMALDG")))
    assert facts[0] == facts[1]


def call(lists=None, seq_lens=None, video=256, text_start=256, scale=0.1):
    return AttentionCall(lists, seq_lens, video, text_start, scale)


def lists(block):
    return Lists(torch.empty(0), torch.empty(0), torch.empty(0), block, 1, 1)


@pytest.mark.parametrize(
    ("q", "given", "reason"),
    [
        (torch.zeros(1, 256, 2, 128), call(), r"float16 and bfloat16 \(got torch.float32\)"),
        (torch.zeros(1, 256, 2, 96).half(), call(), r"head_dim 64 and 128 \(got 96\)"),
        (torch.zeros(1, 256, 2, 64).half(), call(scale=0.0), "scales above 0"),
        (torch.zeros(1, 256, 2, 64).half(), call(lists((64, 64))), r"128 query rows \(got 64\)"),
        (torch.zeros(1, 256, 2, 65).half()[..., :64], call(), "multiples of 16 bytes"),
        (
            torch.zeros(1, 257, 2, 64).half()[:, 1:, :, :].flatten()[1:-127].view(1, 255, 2, 64),
            call(),
            "multiples of 16",
        ),
        (torch.zeros(1, 1, 2, 64).half().expand(1, 256, 2, 64), call(), "multiples of 16 bytes"),
        (torch.zeros(1, 20000, 1, 64).half(), call(text_start=300), "128 key blocks of text"),
        (torch.zeros(1, 256, 2, 64).half(), call(), None),
        (torch.zeros(1, 256, 2, 128).bfloat16(), call(lists((128, 64))), None),
    ],
)
def test_what_it_does_not_take(q, given, reason):
    found = hopper_forward.unsuited(q, q, q, given)
    assert found is None if reason is None else re.search(reason, found)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of sm_90, without one being there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    caches = (backend._triton_missing, backend._take_automatically, gpu.is_hopper, gpu._import, gpu._tell)
    for cached in caches:
        cached.cache_clear()
    yield
    gpu._failed.clear()
    for cached in caches:
        cached.cache_clear()


def test_is_named(hopper, caplog):
    assert describe_backend(GPU) == ("triton", "sm_90, Hopper kernel in Gluon")
    with caplog.at_level(logging.INFO, logger="videosparse"):
        backend.choose("auto", GPU, torch.bfloat16)
    assert caplog.records[0].getMessage().endswith("on cuda:0: sm_90, Hopper kernel in Gluon.")


def test_gluon_that_cannot_be_imported_is_reported_once(hopper, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "videosparse.kernels.hopper_forward", None)
    monkeypatch.delattr("videosparse.kernels.hopper_forward")
    for _ in range(3):
        assert describe_backend(GPU) == ("triton", "sm_90")
    assert len(caplog.records) == 1
    assert "attend does without its Hopper kernel in Gluon, and is slower: it cannot be imported: Mod" in caplog.text
    assert "Triton 3.6 to 3.9 are known to work" in caplog.text


@pytest.fixture
def portable(monkeypatch):
    """The portable kernel replaced by one that counts its calls."""
    calls = []
    monkeypatch.setattr("videosparse.kernels.triton_forward.forward", lambda *call: calls.append(call))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("videosparse.kernels.compiled.KEPT", {})
    take_the_hopper_kernel(monkeypatch)
    yield calls
    gpu._failed.clear()
    gpu._tell.cache_clear()


def test_calls_that_do_not_suit_take_the_portable_kernel(portable, caplog):
    q = torch.zeros(1, 256, 2, 96).half()
    with caplog.at_level(logging.INFO, logger="videosparse"):
        for _ in range(3):
            gpu.forward(q, q, q, call(), False)
    assert len(portable) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "attend does not take its Hopper kernel in Gluon: it takes head_dim 64 and 128 (got 96)."
    ]


def test_gluon_that_changed_is_reported_once(portable, monkeypatch, caplog):
    def changed(*args, **kwargs):
        raise AttributeError("async_load has been removed")

    monkeypatch.setattr(hopper_forward.forward_kernel, "warmup", changed)
    q = torch.zeros(1, 256, 2, 64).half()
    for _ in range(3):
        gpu.forward(q, q, q, call(), False)
    assert len(portable) == 3
    assert len(caplog.records) == 1
    assert "cannot be compiled: AttributeError: async_load has been removed" in caplog.text


def test_failing_to_load_during_a_capture_is_no_reason_to_give_up(portable, monkeypatch):
    def forbidden(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(hopper_forward.forward_kernel, "warmup", forbidden)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q = torch.zeros(1, 256, 2, 64).half()
    with pytest.raises(RuntimeError, match="not permitted"):
        gpu.forward(q, q, q, call(), False)
    assert not portable
    assert not gpu._failed


def test_the_portable_kernel_can_be_asked_for(portable):
    q = torch.zeros(1, 256, 2, 64).half()
    with gpu.portable_only():
        gpu.forward(q, q, q, call(), False)
    assert len(portable) == 1


@pytest.mark.parametrize("step", [3, 20, 200])
@pytest.mark.parametrize(("kind", "dtype"), [("video", torch.bfloat16), ("ragged text", torch.float16)])
def test_maxima_that_grow(on_cpu, kind, dtype, step):
    """Scores, of base 2 and exact, that pass those of the tile before by little, by more, and by much."""
    layout = make_layout(kind, grid=VideoGrid(1, 20, 30)).aligned((128, 128))
    q, k, v = make_qkv(layout, dtype, heads=2)
    position = torch.arange(layout.length)[:, None]
    noise = torch.randint(-4, 5, (2, layout.length, 2))
    q[..., 1:], q[..., 0] = 0, torch.where(q[..., 0].isnan(), q[..., 0], 1)
    k[..., 1:], k[..., 0] = 0, torch.where(k[..., 0].isnan(), k[..., 0], (-position // 128 * step + noise).to(dtype))
    for block_map in (None, make_map(layout, (128, 128), heads=2, density=0.8)):
        index = None if block_map is None else block_map.index()
        options, scale = KernelOptions(backend="triton"), math.log(2)
        out, lse = attend(q, k, v, layout=layout, index=index, scale=scale, return_lse=True, options=options)
        assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map, scale=scale)


def test_rows_whose_first_tile_has_no_keys(on_cpu):
    """Rows are walked from their end, where some list a block of the gap only: what comes later must not be lost."""
    layout = TokenLayout(VideoGrid(1, 10, 30), 40, text_start=640)
    keep = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    keep[..., 3], keep[..., 0], keep[0, 0, 1, 2] = True, True, True
    q, k, v = make_qkv(layout, torch.bfloat16, heads=2)
    run_and_check(layout, BlockMap(keep, (128, 128), layout.length, layout.length), 40 * q, k, v)
