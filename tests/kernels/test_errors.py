"""What attend and block_sums refuse: the message names what, expected, got, and what to do."""

import dataclasses

import pytest
import torch
from inputs import TRITON, make_layout, make_map

from videosparse.kernels import KernelOptions, attend, block_sums, reorder
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import SearchedOrder, TokenOrder

LAYOUT = TokenLayout(VideoGrid(2, 6, 8))
SHAPE = (2, 96, 3, 16)


def tensors(**changes):
    return {name: changes.get(name, torch.zeros(SHAPE)) for name in "qkv"}


REFUSED = {
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
        "BlockIndex.order must be on cpu like q": {"order": index.order.to("meta")},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            attend(**tensors(), layout=LAYOUT, index=dataclasses.replace(index, **change))


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
