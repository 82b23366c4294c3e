"""What attend and block_sums refuse: the message names what, expected, got, and what to do."""

import dataclasses

import pytest
import torch
from inputs import TRITON, make_layout, make_map
from torch.autograd import forward_ad

from videosparse.blocks import BlockMap, PackedIndex
from videosparse.kernels import KernelOptions, attend, block_stats, block_sums, reorder
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import SearchedOrder, TokenOrder

LAYOUT = TokenLayout(VideoGrid(2, 6, 8))
SHAPE = (2, 96, 3, 16)


def tensors(**changes):
    return {name: changes.get(name, torch.zeros(SHAPE)) for name in "qkv"}


REFUSED = {
    "no tensor": (TypeError, r"v must be a tensor \[batch, length, heads, head_dim\] \(got None\)", {"v": None}),
    "rank": (ValueError, r"q must be \[batch, length", {name: torch.zeros(2, 96, 48) for name in "qkv"}),
    "shape": (ValueError, r"k must have the shape of q, \[2, 96, 3, 16\] \(got \[2, 96, 1, 16\]\)", {
        "k": torch.zeros(2, 96, 1, 16)}),
    "dtype": (TypeError, "v must have the dtype of q, torch.float32", {"v": torch.zeros(SHAPE).half()}),
    "device": (ValueError, "k must be on cpu like q", {"k": torch.zeros(SHAPE, device="meta")}),
    "stride": (ValueError, "v must be contiguous along head_dim", {"v": torch.zeros(2, 96, 16, 3).transpose(2, 3)}),
    "integers": (TypeError, "q must be float16", {name: torch.zeros(SHAPE).int() for name in "qkv"}),
    "wide heads": (ValueError, r"head_dim must be 8..128 \(got 256\)", {
        name: torch.zeros(2, 96, 3, 256) for name in "qkv"}),
    "narrow heads": (ValueError, r"head_dim must be 8..128 \(got 4\)", {
        name: torch.zeros(2, 96, 3, 4) for name in "qkv"}),
    "length": (ValueError, "The layout has 96 tokens", {name: torch.zeros(2, 95, 3, 16) for name in "qkv"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_tensors(case):
    error, message, changes = REFUSED[case]
    with pytest.raises(error, match=message):
        attend(**tensors(**changes), layout=LAYOUT)


def test_text_lengths_of_another_batch_or_device():
    for batch, device, message in ((3, "cpu", "is for a batch of 3"), (2, "meta", "layout.seq_lens must be on cpu")):
        lens = torch.full((batch,), 90, dtype=torch.int32, device=device)
        layout = TokenLayout(VideoGrid(1, 8, 8), 32, seq_lens=lens)
        with pytest.raises(ValueError, match=message):
            attend(**tensors(), layout=layout)


def test_index_of_another_geometry():
    index = make_map(LAYOUT, (64, 64)).index()
    refused = {
        "is for 80 x 96 tokens, the tensors have 96": {"q_len": 80},
        "is for 4 samples and 1 heads, the tensors have 2 and 3": {"shape": (4, 1, 2, 2)},
        "is for 1 samples and 2 heads": {"shape": (1, 2, 2, 2)},
        r"has 3 x 2 blocks, 96 tokens in blocks of \(64, 64\) need 2 x 2": {"shape": (1, 1, 3, 2)},
        r"BlockIndex.row_ptr must be int32 \[3\] \(got torch.int32 \[2\]\)": {"row_ptr": index.row_ptr[1:]},
        r"BlockIndex.ids must be int16 or int32 \[capacity\] \(got torch.int64": {"ids": index.ids.long()},
        r"BlockIndex.order must be int32 \[3\] \(got torch.int16": {"order": index.order.short()},
        "BlockIndex.order must be on cpu like row_ptr": {"order": index.order.to("meta")},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            attend(**tensors(), layout=LAYOUT, index=dataclasses.replace(index, **change))


def test_other_things_in_place_of_an_index():
    block_map = make_map(LAYOUT, (64, 64))
    packed = PackedIndex.allocate(LAYOUT, (64, 64), 2, 3, 10)
    refused = {
        r"index must be a BlockIndex or None \(got BlockMap\); pass map.index\(\)": block_map,
        r"\(got PackedIndex\); pass kernels.selection.expand\(index\)": packed,
        r"\(got Tensor\); leave it out for dense attention": block_map.keep,
    }
    for message, index in refused.items():
        with pytest.raises(TypeError, match=message):
            attend(**tensors(), layout=LAYOUT, index=index)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_lists_that_name_other_blocks(quant):
    q = torch.zeros(2, 96, 3, 64).half()
    index = BlockMap.full(LAYOUT, (64, 64)).index()
    assert index.row_ptr.tolist() == [0, 2, 4]
    refused = {
        r"row_ptr must rise from 0 to at most 4, the number of its ids \(got 0 to 5\)": {"row_ptr": [0, 2, 5]},
        r"row_ptr must rise from 0 to at most 4, the number of its ids \(got 1 to 4\)": {"row_ptr": [1, 2, 4]},
        r"row_ptr must rise from 0": {"row_ptr": [0, 3, 2]},
        r"ids must be numbers of blocks, 0..1 \(got 0 to 2\); build it with BlockMap.index\(\)": {"ids": [0, 1, 0, 2]},
        r"ids must be numbers of blocks, 0..1 \(got -1 to 1\)": {"ids": [-1, 1, 0, 1]},
        r"ids must ascend within a row, each block once \(got 1 before 0 in row 1\); build it": {"ids": [0, 1, 1, 0]},
        r"each block once \(got 1 before 1 in row 0\)": {"ids": [1, 1, 0, 1]},
    }
    for message, changes in refused.items():
        lists = {name: torch.tensor(x, dtype=getattr(index, name).dtype) for name, x in changes.items()}
        options = KernelOptions(backend="torch", quant=quant)
        with pytest.raises(ValueError, match=message):
            attend(q, q, q, layout=LAYOUT, index=dataclasses.replace(index, **lists), options=options)
    index.ids[3:] = 7  # beyond the last row nothing is defined
    index.row_ptr[2] = 3
    attend(q, q, q, layout=LAYOUT, index=index)


CALLS = {
    "attend": lambda **changes: attend(**tensors(), **{"layout": LAYOUT} | changes),
    "block_sums": lambda **changes: look(block_sums, changes),
    "block_stats": lambda **changes: look(block_stats, changes),
    "reorder": lambda **changes: reorder(
        torch.zeros(SHAPE), **{"layout": LAYOUT, "order": TokenOrder(LAYOUT.grid, (0, 1, 2))} | changes
    ),
}


def look(function, changes):
    return function(
        torch.zeros(SHAPE),
        torch.zeros(SHAPE),
        **{"lse": torch.zeros(2, 3, 96), "layout": LAYOUT, "block": (64, 64)} | changes,
    )


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_other_types(name):
    refused = {
        r"layout must be a TokenLayout \(got VideoGrid\); pass TokenLayout\(grid\)": {"layout": LAYOUT.grid},
        r"layout must be a TokenLayout \(got \(2, 6, 8\)\); pass TokenLayout\(VideoGrid": {"layout": (2, 6, 8)},
        r"options must be KernelOptions \(got 'triton'\); pass KernelOptions\(backend='triton'\)": {
            "options": "triton"
        },
        r"options must be KernelOptions \(got None\); or leave them out": {"options": None},
    }
    if name != "block_sums":
        refused[r"order must be a TokenOrder .* \(got 'fhw'\).*TokenOrder.from_names\(grid, names\)"] = {"order": "fhw"}
    if name.startswith("block"):
        refused[r"lse must be a tensor, as attend\(return_lse=True\) gives it \(got None\)"] = {"lse": None}
    for message, changes in refused.items():
        with pytest.raises(TypeError, match=message):
            CALLS[name](**changes)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["attend", "block_sums", "block_stats"])
def test_scales_that_are_not_finite(name, scale):
    with pytest.raises(ValueError, match=rf"scale must be a finite number \(got {scale}\); the default is head_dim"):
        CALLS[name](scale=scale)


@pytest.mark.parametrize("place", range(3))
def test_forward_mode_derivatives(place):
    qkv = [torch.randn(SHAPE) for _ in range(3)]

    def call(x):
        return attend(*qkv[:place], x, *qkv[place + 1 :], layout=LAYOUT)

    with pytest.raises(NotImplementedError, match=f"no forward-mode derivative, and {'qkv'[place]} has a tangent"):
        torch.func.jvp(call, (qkv[place],), (torch.ones(SHAPE),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="take gradients backward"):
        call(forward_ad.make_dual(qkv[place], torch.ones(SHAPE)))


def test_short_ids_of_many_columns(monkeypatch):
    index = make_map(LAYOUT, (64, 64)).index()
    monkeypatch.setattr("videosparse.blocks.SHORT_IDS", 2)
    with pytest.raises(ValueError, match=r"BlockIndex.ids must be int32 \[capacity\] \(got torch.int16"):
        attend(**tensors(), layout=LAYOUT, index=index)


def test_orders_of_other_heads_grids_and_devices():
    refused = {
        "TokenOrder is for 2 heads on grid 2x6x8 .got 3 heads": TokenOrder(LAYOUT.grid, (0, 1)),
        "TokenOrder is for 3 heads on grid 2x8x6 .got 3 heads on grid 2x6x8": TokenOrder(VideoGrid(2, 8, 6), (0, 1, 2)),
        "order's codes must be on cpu": SearchedOrder(LAYOUT.grid, torch.zeros(3, dtype=torch.int32, device="meta")),
    }
    for message, order in refused.items():
        with pytest.raises(ValueError, match=message):
            attend(**tensors(), layout=LAYOUT, order=order)
        with pytest.raises(ValueError, match=message):
            reorder(torch.zeros(SHAPE), order, LAYOUT)


def test_reorder_of_another_sequence():
    order = TokenOrder(LAYOUT.grid, (0, 1, 2))
    with pytest.raises(ValueError, match=r"x must be \[batch, 96 tokens, heads, head_dim\]"):
        reorder(torch.zeros(2, 95, 3, 16), order, LAYOUT)
    layout = TokenLayout(LAYOUT.grid, 5)
    with pytest.raises(ValueError, match=r"text must be \[2, 5, 3, 16\] for this layout \(got \[2, 4, 3, 16\]\)"):
        reorder(torch.zeros(SHAPE), order, layout, text=torch.zeros(2, 4, 3, 16))


def test_triton_on_the_cpu():
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here'):
        attend(**tensors(), layout=LAYOUT, options=TRITON)


def test_options():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, fa4, flex"):
        KernelOptions(backend="cuda")
    with pytest.raises(ValueError, match=r'quant must be None, "int8", "int8-fp8" or "int8-int8" \(got .int4.\)'):
        KernelOptions(quant="int4")
    for backend in ("fa4", "flex"):
        with pytest.raises(ValueError, match=f'backend="{backend}" has no integer attention, which quant="int8" asks'):
            KernelOptions(backend=backend, quant="int8")


def test_block_sums():
    q, k = torch.zeros(SHAPE), torch.zeros(SHAPE)
    lse = torch.zeros(2, 3, 96)
    with pytest.raises(ValueError, match="block must be"):
        block_sums(q, k, lse, layout=LAYOUT, block=(32, 64))
    with pytest.raises(ValueError, match=r"lse must be \[batch, heads, length\] = \[2, 3, 96\] \(got \[2, 96, 3\]\)"):
        block_sums(q, k, lse.transpose(1, 2), layout=LAYOUT, block=(64, 64))
    with pytest.raises(TypeError, match="lse must be float32"):
        block_sums(q, k, lse.half(), layout=LAYOUT, block=(64, 64))
    with pytest.raises(ValueError, match="lse must be on the device of q"):
        block_sums(q, k, lse.to("meta"), layout=LAYOUT, block=(64, 64))
    with pytest.raises(ValueError, match="The layout has 310 tokens"):
        block_sums(q, k, lse, layout=make_layout("text"), block=(64, 64))
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here'):
        block_sums(q, k, lse, layout=LAYOUT, block=(64, 64), options=TRITON)
