"""The Triton kernel under Triton's interpreter, which must be on before Triton is imported: see interpreter.py.

float16 and float32 only: the interpreter computes bfloat16 wrongly. Sequences are short, since a tile takes 10 ms.
"""

import pytest
import torch
from inputs import (
    BLOCKS,
    LAYOUTS,
    MAP_SHARES,
    TORCH,
    TRITON,
    PoisonedEmpty,
    assert_accurate,
    assert_same_of_both_ids,
    assert_sums_accurate,
    make_layout,
    make_map,
    make_qkv,
)

from videosparse.blocks import BlockMap
from videosparse.kernels import attend, block_sums
from videosparse.kernels.value_tail import value_tail
from videosparse.layout import TokenLayout, VideoGrid

SMALL = VideoGrid(2, 7, 10)


def run_and_check(layout, block_map, q, k, v, **kwargs):
    index = None if block_map is None else block_map.index()
    out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=TRITON, **kwargs)
    assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map, **kwargs)
    assert out.is_contiguous()
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)


@pytest.fixture(autouse=True)
def _unwritten_elements_are_nan(monkeypatch):
    monkeypatch.setattr(torch, "empty", PoisonedEmpty())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("sparse", [True, False])
def test_layouts(kind, sparse):
    layout = make_layout(kind, grid=SMALL).aligned((64, 64))
    block_map = make_map(layout, (64, 64), heads=2) if sparse else None
    run_and_check(layout, block_map, *make_qkv(layout, torch.float32, heads=2, dim=16))


@pytest.mark.parametrize("kind", ["text", "ragged text"])
def test_dense_without_a_gap(kind):
    layout = make_layout(kind, grid=SMALL)
    run_and_check(layout, None, *make_qkv(layout, torch.float16, heads=1, dim=16))


@pytest.mark.parametrize("lens", [None, [150, 190]])
def test_dense_with_a_gap_that_ends_inside_a_tile(lens):
    """The last tile of the video reaches into the text."""
    lens = None if lens is None else torch.tensor(lens, dtype=torch.int32)
    layout = TokenLayout(SMALL, 40, text_start=150, seq_lens=lens)
    run_and_check(layout, None, *make_qkv(layout, torch.float16, heads=1, dim=16))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blocks_and_dtypes(block, dtype):
    layout = make_layout("ragged text", grid=SMALL).aligned(block)
    run_and_check(layout, make_map(layout, block, heads=1), *make_qkv(layout, dtype, heads=1))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["fused", "head-major"])
def test_shared_maps_and_strides(share, view):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    block_map = make_map(layout, (64, 64), share, heads=2)
    run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=2, dim=16, view=view))


@pytest.mark.parametrize("dim", [8, 12, 80, 128])
def test_head_dims(dim):
    layout = make_layout("video", grid=SMALL)
    run_and_check(layout, make_map(layout, (64, 64), heads=1), *make_qkv(layout, torch.float16, heads=1, dim=dim))


@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_scale(scale):
    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    run_and_check(layout, None, *make_qkv(layout, torch.float32, batch=1, heads=1, dim=16), scale=scale)


def test_large_scores_neither_overflow_nor_vanish():
    layout = make_layout("video", grid=VideoGrid(1, 7, 10))
    q, k, v = make_qkv(layout, torch.float32, batch=1, heads=1, dim=16)
    for factor in (1e3, -1e3):
        run_and_check(layout, None, q * factor, k, v)
    # all scores of a row far below 0
    run_and_check(layout, None, q.abs() * 1e3, -k.abs(), v)


def test_order_is_only_an_order():
    layout = make_layout("video", grid=SMALL)
    q, k, v = make_qkv(layout, torch.float16, heads=2, dim=16)
    index = make_map(layout, (64, 64), "per head", heads=2).index()
    out = attend(q, k, v, layout=layout, index=index, options=TRITON)
    index.order[:-1] = index.order[:-1].flip(0)
    assert torch.equal(out, attend(q, k, v, layout=layout, index=index, options=TRITON))


def test_ids_of_both_sizes_give_the_same(monkeypatch):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float16, heads=2, dim=16)
    call = lambda x: attend(q, k, v, layout=layout, index=x, return_lse=True, options=TRITON)  # noqa: E731
    assert_same_of_both_ids(call, make_map(layout, (64, 64), "per head", heads=2), monkeypatch)


@pytest.mark.parametrize("dimension", ["sample", "token", "head"])
def test_offsets_beyond_32_bits(dimension):
    """Strides below 2^31 whose last multiple is above; only the touched pages of the storage exist."""
    layout = TokenLayout(VideoGrid(1, 1, 70))
    batch = heads = 3
    dim = 16
    strides = {
        "sample": (2**30 + 64, heads * dim, dim, 1),
        "token": (heads * dim, 2**25 + 64, dim, 1),
        "head": (70 * dim, dim, 2**30 + 64, 1),
    }[dimension]
    size = 1 + sum((n - 1) * s for n, s in zip((batch, 70, heads, dim), strides, strict=True))
    assert size > 2**31
    storage = torch.empty.empty(size + 3 * 8192, dtype=torch.float16)
    small = make_qkv(layout, torch.float16, batch=batch, heads=heads, dim=dim)
    views = [storage.as_strided(x.shape, strides, i * 8192).copy_(x) for i, x in enumerate(small)]
    for index in (None, BlockMap.full(layout, (64, 64)).index()):
        out = attend(*views, layout=layout, index=index, options=TRITON)
        assert_accurate(out, None, *small, layout=layout)


def check_sums(layout, block, dtype, dim, heads=1, view="contiguous", **kwargs):
    """Against fp64, as exact as plain torch in fp32 on the same q, k and lse."""
    q, k, v = make_qkv(layout, dtype, heads=heads, dim=dim, view=view)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, options=TORCH, **kwargs)
    found = block_sums(q, k, lse, layout=layout, block=block, options=TRITON, **kwargs)
    assert_sums_accurate(found, q, k, lse, layout, block, **kwargs)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_block_sums_layouts(kind, aligned):
    layout = make_layout(kind, grid=SMALL)
    check_sums(layout.aligned((64, 64)) if aligned else layout, (64, 64), torch.float32, 16)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_block_sums_blocks(block, dtype):
    check_sums(make_layout("ragged text", grid=SMALL), block, dtype, 12, heads=2, view="fused", scale=0.4)


@pytest.mark.parametrize("view", ["contiguous", "fused", "head-major"])
@pytest.mark.parametrize("first", [0, 128])
def test_value_tail(view, first):
    layout = make_layout("ragged text", grid=SMALL).aligned((64, 128))
    _, _, v = make_qkv(layout, torch.float16, heads=2, dim=64, view=view)
    tail = value_tail(v, layout.seq_lens, first, layout.video, layout.text_start)
    expected = v.masked_fill(~layout.key_mask(2, "cpu")[:, :, None, None], 0)[:, first:]
    assert torch.equal(tail, expected)
    assert tail.is_contiguous()


def test_order_covers_long_rows_of_shared_maps():
    layout = TokenLayout(VideoGrid(1, 23, 30))
    keep = torch.eye(11, dtype=torch.bool)[None, None].repeat(1, 2, 1, 1)
    keep[:, :, 4] = True
    keep[:, 1, 9] = True
    for shared in (keep, keep[:, :1]):
        block_map = BlockMap(shared, (64, 64), layout.length, layout.length)
        assert block_map.index().order[-1] > 0
        run_and_check(layout, block_map, *make_qkv(layout, torch.float16, heads=2, dim=16))
