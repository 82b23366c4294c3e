"""attend in torch on the CPU: accuracy for every geometry, and the invariants of attention."""

import pytest
import torch
import torch.nn.functional as F
from inputs import (
    BLOCKS,
    LAYOUTS,
    MAP_SHARES,
    TORCH,
    assert_accurate,
    assert_same_of_both_ids,
    make_layout,
    make_map,
    make_qkv,
)

from videosparse.blocks import BlockMap
from videosparse.kernels import attend, torch_path
from videosparse.layout import TokenLayout, VideoGrid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_and_check(layout, block_map, q, k, v, **kwargs):
    index = None if block_map is None else block_map.index()
    out, lse = attend(q, k, v, layout=layout, index=index, return_lse=True, options=TORCH, **kwargs)
    assert_accurate(out, lse, q, k, v, layout=layout, block_map=block_map, **kwargs)
    alone = attend(q, k, v, layout=layout, index=index, options=TORCH, **kwargs)
    assert_accurate(alone, None, q, k, v, layout=layout, block_map=block_map, **kwargs)
    assert alone.is_contiguous()
    assert alone.dtype == q.dtype
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_sparse_is_accurate(kind, block):
    layout = make_layout(kind).aligned(block)
    run_and_check(layout, make_map(layout, block), *make_qkv(layout, torch.float32))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_text_may_share_a_block_with_video(kind):
    layout = make_layout(kind)
    run_and_check(layout, make_map(layout, (64, 64)), *make_qkv(layout, torch.float32))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("aligned", [False, True])
def test_dense_is_accurate(kind, aligned):
    layout = make_layout(kind)
    layout = layout.aligned((128, 128)) if aligned else layout
    run_and_check(layout, None, *make_qkv(layout, torch.float32))


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("view", ["contiguous", "fused", "head-major"])
def test_shared_maps_and_strides(share, view):
    layout = make_layout("ragged text").aligned((64, 64))
    run_and_check(layout, make_map(layout, (64, 64), share), *make_qkv(layout, torch.float32, view=view))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 12, 80, 128])
def test_dtypes_and_head_dims(dtype, dim):
    layout = make_layout("ragged text").aligned((64, 128))
    run_and_check(layout, make_map(layout, (64, 128)), *make_qkv(layout, dtype, dim=dim))


def test_scale_is_respected():
    layout = make_layout("text")
    for scale in (0.5, -0.25, 0.0):
        run_and_check(layout, make_map(layout, (64, 64)), *make_qkv(layout, torch.float32), scale=scale)


def test_full_map_is_sdpa():
    layout = TokenLayout(VideoGrid(3, 9, 10))
    q, k, v = make_qkv(layout, torch.float64)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for block in BLOCKS:
        out = attend(q, k, v, layout=layout, index=BlockMap.full(layout, block).index(), options=TORCH)
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attend(q, k, v, layout=layout, options=TORCH), expected)


def test_disjoint_maps_merged_by_lse_are_one_call():
    layout = make_layout("ragged text").aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float64)
    whole = make_map(layout, (64, 64), "per head")
    part = whole.keep & (torch.rand(whole.keep.shape) < 0.5)
    pieces = []
    for keep in (part, whole.keep & ~part):
        index = BlockMap(keep, whole.block, layout.length, layout.length).index()
        pieces.append(attend(q, k, v, layout=layout, index=index, return_lse=True, options=TORCH))
    out, lse = attend(q, k, v, layout=layout, index=whole.index(), return_lse=True, options=TORCH)
    merged = torch.logaddexp(pieces[0][1], pieces[1][1])
    torch.testing.assert_close(merged, lse)
    weights = [torch.exp(p[1] - merged.masked_fill(merged == -torch.inf, 0)).transpose(1, 2)[..., None] for p in pieces]
    torch.testing.assert_close(pieces[0][0] * weights[0] + pieces[1][0] * weights[1], out)


def test_sharing_a_map_is_repeating_it():
    layout = make_layout("ragged text").aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float32)
    shared = make_map(layout, (64, 64))
    repeated = BlockMap(shared.keep.repeat(2, 3, 1, 1), shared.block, layout.length, layout.length)
    outs = [attend(q, k, v, layout=layout, index=m.index(), options=TORCH) for m in (shared, repeated)]
    torch.testing.assert_close(*outs)


def test_nothing_leaks_from_invalid_tokens():
    layout = make_layout("ragged text").aligned((128, 128))
    index = make_map(layout, (128, 128)).index()
    q, k, v = make_qkv(layout, torch.float32)
    outs = [
        attend(*(x.nan_to_num(value) for x in (q, k, v)), layout=layout, index=index, return_lse=True, options=TORCH)
        for value in (0.0, 1e30, float("inf"))
    ]
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0])
        assert torch.equal(lse, outs[0][1])


def test_list_capacity_beyond_the_entries_is_not_read():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    block_map = make_map(layout, (64, 64))
    index = block_map.index(capacity=block_map.keep.numel())
    index.ids[int(index.row_ptr[-1]) :] = 30_000
    assert_accurate(attend(q, k, v, layout=layout, index=index), None, q, k, v, layout=layout, block_map=block_map)


def test_ids_of_both_sizes_give_the_same(monkeypatch):
    layout = make_layout("ragged text").aligned((128, 64))
    inputs = [x.requires_grad_() for x in make_qkv(layout, torch.float32)]
    call = lambda x: attend(*inputs, layout=layout, index=x)  # noqa: E731
    grad = torch.randn_like(inputs[0])
    block_map = make_map(layout, (128, 64), "per head")
    assert_same_of_both_ids(lambda x: (out := call(x), *torch.autograd.grad(out, inputs, grad)), block_map, monkeypatch)


def test_scores_are_held_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 4000)
    layout = make_layout("ragged text").aligned((64, 64))
    run_and_check(layout, make_map(layout, (64, 64)), *make_qkv(layout, torch.float32))


@pytest.mark.parametrize(("batch", "heads"), [(0, 3), (2, 0)])
def test_nothing_to_attend(batch, heads):
    layout = make_layout("video")
    q = torch.zeros(batch, layout.length, heads, 64)
    out, lse = attend(q, q, q, layout=layout, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (batch, heads, layout.length)


def test_a_default_device_is_not_mixed_in():
    layout = make_layout(next(iter(LAYOUTS))).aligned((64, 64))
    q, k, v = make_qkv(layout, torch.float32)
    index = make_map(layout, (64, 64)).index()
    expected = attend(q, k, v, layout=layout, index=index, options=TORCH)
    with torch.device("meta"):
        found = attend(q, k, v, layout=layout, index=index, options=TORCH)
    assert torch.equal(found, expected)
