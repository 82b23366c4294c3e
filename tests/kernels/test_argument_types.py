"""Arguments of another type: every call says in one line what it expected and what it got, whichever argument it is."""

import re

import pytest
import torch

from videosparse.blocks import BlockIndex, BlockMap, PackedIndex
from videosparse.kernels import (
    KernelOptions,
    Stream,
    attend,
    block_stats,
    block_sums,
    describe_backend,
    norm_rotate,
    reorder,
)
from videosparse.kernels.selection import Selection, expand, select
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.logits import FarLogits
from videosparse.ordering import SearchedOrder, TokenOrder
from videosparse.policies.adaspa import AdaSpaPolicy
from videosparse.policies.base import DenseSchedule, RunStep
from videosparse.policies.paro import PAROPolicy
from videosparse.policies.radial import RadialPolicy
from videosparse.reference import attention_reference

GRID = VideoGrid(2, 6, 8)
LAYOUT = TokenLayout(GRID)
TEXT = TokenLayout(GRID, 8)
BLOCK = (64, 64)
MAP = BlockMap.full(LAYOUT, BLOCK)
INDEX = MAP.index()
ORDER = TokenOrder(GRID, (0, 1, 2))
RADIAL = RadialPolicy(block=BLOCK)
Q = torch.zeros(2, 96, 3, 16)
TOKENS = torch.arange(96)[None]
LSE = torch.zeros(2, 3, 96)
ONES = torch.ones(48)
VIDEO = {"q": Q.flatten(2), "k": Q.flatten(2), "q_weight": ONES, "k_weight": ONES, "eps": 1e-6}
WORDS = Stream(torch.zeros(2, 8, 48), torch.zeros(2, 8, 48), ONES, ONES, 1e-6)
TURNS = (torch.ones(96, 1, 8), torch.zeros(96, 1, 8))
LISTS = {"row_ptr": INDEX.row_ptr, "ids": INDEX.ids, "order": INDEX.order, "shape": INDEX.shape} | {
    "block": BLOCK, "q_len": 96, "kv_len": 96,
}  # fmt: skip
OPTIONS = {"options": KernelOptions()}
LOOK = {"q": Q, "k": Q, "lse": LSE, "layout": LAYOUT, "block": BLOCK, "scale": 1.0} | OPTIONS
CPU = torch.device("cpu")
CALL = {"layout": LAYOUT, "run": RunStep("cond", 1, 8), "layer": 0, "device": CPU, "samples": 2, "heads": 3}
PACKED = PackedIndex.allocate(LAYOUT, BLOCK, 2, 3, 24)

# a call, and arguments that it takes; the types of each are what it is tried without
CALLS = {
    "attend": (attend, {"q": Q, "k": Q, "v": Q, "layout": LAYOUT, "index": INDEX, "order": ORDER, "scale": 1.0,
                        "return_lse": True} | OPTIONS),
    "block_sums": (block_sums, LOOK | {"sample": 16}),
    "block_stats": (block_stats, LOOK | {"eps": 1e-3, "order": ORDER}),
    "norm_rotate": (norm_rotate, {"video": Stream(**VIDEO), "text": WORDS, "heads": 3, "rotary": TURNS,
                                  "text_start": 96, "order": ORDER} | OPTIONS),
    "Stream": (lambda **parts: norm_rotate(Stream(**parts), heads=3), VIDEO),
    "reorder": (reorder, {"x": Q, "order": ORDER, "layout": TEXT, "text": Q[:, :8], "inverse": False} | OPTIONS),
    "KernelOptions": (KernelOptions, {"backend": "auto", "quant": "int8", "logit": None, "fused_norm": "on"}),
    "BlockMap": (BlockMap, {"keep": MAP.keep, "block": BLOCK, "q_len": 96, "kv_len": 96}),
    "BlockMap.full": (BlockMap.full, {"layout": LAYOUT, "block": BLOCK, "device": CPU}),
    "BlockMap.index": (MAP.index, {"capacity": 4}),
    "BlockMap.video_density": (MAP.video_density, {"layout": LAYOUT}),
    "BlockMap.picture": (MAP.picture, {"width": 8}),
    "BlockIndex": (lambda **parts: attend(Q, Q, Q, layout=LAYOUT, index=BlockIndex(**parts)), LISTS),
    "BlockIndex.build": (BlockIndex.build, {"block_map": MAP, "capacity": 4}),
    "BlockIndex.transpose": (lambda **parts: BlockIndex(**parts).transpose(), LISTS),
    "PackedIndex.allocate": (PackedIndex.allocate, {"layout": LAYOUT, "block": BLOCK, "samples": 2, "heads": 3,
                                                    "capacity": 24, "device": CPU, "pinned": False}),
    "select": (select, {"sums": torch.zeros(2, 3, 2, 2), "index": PACKED, "selection": Selection(2, 2, 1, 1, 1, 0.9),
                        "backend": "torch"}),
    "expand": (expand, {"index": PACKED, "backend": "torch"}),
    "TokenOrder": (TokenOrder, {"grid": GRID, "codes": (0, 1, 2)}),
    "TokenOrder.from_names": (TokenOrder.from_names, {"grid": GRID, "names": ("FHW", "WHF")}),
    "TokenOrder.apply": (ORDER.apply, {"x": Q, "layout": LAYOUT}),
    "TokenOrder.permutation": (ORDER.permutation, {"device": CPU}),
    "SearchedOrder": (SearchedOrder, {"grid": GRID, "codes": torch.tensor([0, 1])}),
    "TokenLayout": (TokenLayout, {"grid": GRID, "text": 8, "text_start": 100,
                                  "seq_lens": torch.tensor([108], dtype=torch.int32)}),
    "TokenLayout.aligned": (TEXT.aligned, {"block": BLOCK}),
    "TokenLayout.key_mask": (TEXT.key_mask, {"batch": 2, "device": CPU}),
    "FarLogits": (FarLogits, {"trained": 21, "alpha": 0.9}),
    "DenseSchedule": (DenseSchedule, {"first_steps": 0.2, "last_steps": 0.1, "first_layers": 1, "last_layers": 1}),
    "RadialPolicy": (RadialPolicy, {"decay": 0.2, "block": BLOCK, "coverage": "any", "sink": True,
                                    "first_neighbour": "full"}),
    "RadialPolicy.block_map": (RADIAL.block_map, {"layout": LAYOUT, "device": CPU}),
    "RadialPolicy.block_index": (RADIAL.block_index, {"layout": LAYOUT, "device": CPU}),
    "RadialPolicy.band": (RADIAL.band, {"grid": GRID}),
    "AdaSpaPolicy": (AdaSpaPolicy, {"density": 0.2, "block": BLOCK, "refresh": (10, 30), "head_adaptive": True,
                                    "recall_threshold": 0.9, "sample": 16, "lse_dtype": "float32",
                                    "offload_state": False}),
    "PAROPolicy": (PAROPolicy, {"calibrated": None, "density": 0.2, "block": BLOCK, "alpha": 0.5,
                                "online_maps": False, "order_by": "metric"}),
    "RunStep": (RunStep, {"context": "cond", "index": 1, "total": 8, "expert": 0, "part": (0, 4)}),
    "RadialPolicy.plan": (RADIAL.plan, CALL | {"state": {}}),
    "AdaSpaPolicy.plan": (AdaSpaPolicy(block=BLOCK).plan, CALL | {"state": {}}),
    "PAROPolicy.plan": (PAROPolicy(block=BLOCK).plan, CALL | {"state": {}}),
    "describe_backend": (describe_backend, {"device": CPU}),
    "attention_reference": (attention_reference, {"q": Q, "k": Q, "v": Q, "layout": LAYOUT, "block_map": MAP,
                                                  "scale": 1.0, "logit": FarLogits(1), "tokens": TOKENS}),
}  # fmt: skip
WRONG = ("fhw", 2.5, ("a", "b"), [1, 2], {}, object(), LAYOUT, torch.zeros(3))
ARGUMENTS = [(call, argument) for call, (_, good) in CALLS.items() for argument in good]


@pytest.mark.parametrize("name", CALLS)
def test_the_right_types_are_taken(name):
    call, good = CALLS[name]
    call(**good)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_other_types_are_refused_in_one_line(name, argument):
    call, good = CALLS[name]
    for wrong in WRONG:
        if isinstance(wrong, type(good[argument])):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**good | {argument: wrong})
        message = str(caught.value)
        assert re.fullmatch(rf"[^\n]*{argument}[^\n]*got [^\n]*\.", message), message


def test_a_name_in_place_of_an_order():
    with pytest.raises(TypeError, match=r"order must be a TokenOrder .* \(got 'fhw'\).*TokenOrder.from_names"):
        norm_rotate(Stream(**VIDEO), heads=3, order="fhw")


@pytest.mark.parametrize("name", [name for name, (_, good) in CALLS.items() if "device" in good and "run" not in good])
def test_names_of_devices(name):
    call, good = CALLS[name]
    call(**good | {"device": "cpu"})
    with pytest.raises(ValueError, match=r'device must be .* such as "cpu" or "cuda:0" \(got \'gpu\'\)\.'):
        call(**good | {"device": "gpu"})


@pytest.mark.parametrize("name", ["select", "expand"])
def test_names_of_backends(name):
    call, good = CALLS[name]
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, fa4, flex \(got 'cuda'\)\."):
        call(**good | {"backend": "cuda"})
