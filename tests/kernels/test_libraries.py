"""Libraries behind the same lists: padded tables, masks, and what is refused. Their kernels need a GPU: test_gpu.py."""

import pytest
import torch
from inputs import MAP_SHARES, make_layout, make_map, make_qkv

from videosparse.blocks import BlockMap
from videosparse.kernels import KernelOptions, attend, fa4_path, flex_path
from videosparse.kernels.backend import unavailable
from videosparse.kernels.call import AttentionCall, Lists
from videosparse.kernels.libraries import import_library
from videosparse.kernels.padded import pad, padded

BLOCK = (128, 64)


def call_of(layout, block_map, dim=64):
    index = None if block_map is None else block_map.index()
    lists = None if index is None else Lists(index.row_ptr, index.ids, index.order, index.block, *index.shape[:2])
    start = layout.text_start if layout.text else layout.video
    return AttentionCall(lists, layout.seq_lens if layout.text else None, layout.video, start, dim**-0.5)


def kept(counts, ids):
    """Bool [.., rows, columns] from counts and a table."""
    columns = ids.shape[-1]
    place = torch.where(torch.arange(columns) < counts[..., None], ids, columns).long()
    return torch.zeros(*ids.shape[:-1], columns + 1, dtype=torch.bool).scatter_(-1, place, True)[..., :columns]


@pytest.mark.parametrize("share", MAP_SHARES)
@pytest.mark.parametrize("fewest", [2**15, 0])
def test_tables_hold_the_map(share, fewest, monkeypatch):
    monkeypatch.setattr("videosparse.kernels.padded._SLAB", 40)  # several slabs
    monkeypatch.setattr("videosparse.blocks.SHORT_IDS", fewest)  # int16 ids or int32, tables are int32
    layout = make_layout("ragged text").aligned(BLOCK)
    block_map = make_map(layout, BLOCK, share)
    lists = call_of(layout, block_map).lists
    tables = pad(lists, block_map.keep.shape[3])
    assert torch.equal(kept(tables.counts, tables.ids), block_map.keep)
    assert (tables.ids.dtype, tables.counts.dtype, int(tables.empty.sum())) == (torch.int32, torch.int32, 0)
    assert tables.bytes == 4 * (tables.ids.numel() + 2 * tables.counts.numel())


def test_tables_of_an_empty_map():
    keep = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    tables = pad(call_of(make_layout("video"), BlockMap(keep, (128, 64), 200, 190)).lists, 3)
    assert not kept(tables.counts, tables.ids).any()


def test_tables_are_made_once_until_lists_change():
    lists = call_of(make_layout("video"), make_map(make_layout("video"), BLOCK)).lists
    first = padded(lists, 5)
    assert padded(lists, 5) is first
    lists.ids.copy_(lists.ids)
    assert padded(lists, 5) is not first


@pytest.mark.parametrize("kind", ["video", "text", "ragged text", "no text at all"])
def test_flex_masks_keep_what_the_lists_keep(kind):
    layout = make_layout(kind).aligned(BLOCK)
    block_map = make_map(layout, BLOCK, "per head")
    call = call_of(layout, block_map)
    mask = flex_path.block_mask(call, 2, layout.length)
    assert flex_path.block_mask(call, 2, layout.length) is mask
    full, part = kept(mask.full_kv_num_blocks, mask.full_kv_indices), kept(mask.kv_num_blocks, mask.kv_indices)
    assert not (full & part).any()
    assert torch.equal(full | part, block_map.keep)
    # full blocks are not masked, so all of their tokens are valid in every sample
    valid = layout.key_mask(2, "cpu")
    valid = torch.nn.functional.pad(valid, (0, -layout.length % 64), value=True).view(2, -1, 64).all(2).all(0)
    assert valid[full.any(2).any(1)[0]].all()
    if layout.text:
        sample, key = torch.arange(2)[:, None], torch.arange(layout.length)
        assert torch.equal(mask.mask_mod(sample, 0, 0, key), layout.key_mask(2, "cpu"))


def test_flex_mask_follows_new_text_lengths():
    layout = make_layout("ragged text").aligned(BLOCK)
    block_map = make_map(layout, BLOCK)
    call = call_of(layout, block_map)
    mask = flex_path.block_mask(call, 2, layout.length)
    other = AttentionCall(call.lists, call.seq_lens + 3, call.video, call.text_start, call.scale)
    assert flex_path.block_mask(other, 2, layout.length) is mask, "another rule would compile again"
    end = int(call.seq_lens[0]) + 2
    assert mask.mask_mod(torch.tensor(0), 0, 0, torch.tensor(end))


def test_fa4_refuses_what_it_cannot_mask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layout = make_layout("ragged text").aligned((128, 128))
    q = make_qkv(layout, torch.bfloat16)[0]
    assert "cannot mask text padding" in fa4_path.unsuited(q, call_of(layout, None))
    video = make_layout("video")
    q = make_qkv(video, torch.bfloat16)[0]
    assert fa4_path.unsuited(q, call_of(video, make_map(video, (128, 64)))) is None
    assert "must be (128, 128) or (128, 64)" in fa4_path.unsuited(q, call_of(video, make_map(video, (64, 64))))
    assert "takes float16 and bfloat16" in fa4_path.unsuited(q.float(), call_of(video, None))
    assert "multiple of 8" in fa4_path.unsuited(q[..., :12], call_of(video, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "Hopper only" in fa4_path.unsuited(q, call_of(video, make_map(video, (128, 128))))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(RuntimeError, match='backend="fa4" cannot run this call: blocks must be'):
        fa4_path.forward(q, q, q, call_of(video, make_map(video, (64, 64))), False)


def test_flex_refuses_what_it_cannot_run():
    layout = make_layout("ragged text")
    q = make_qkv(layout, torch.float16, dim=48)[0]
    assert "power of two" in flex_path.unsuited(q, call_of(layout, None))
    assert "need a block map" in flex_path.unsuited(q[..., :32], call_of(layout, None))
    with pytest.raises(RuntimeError, match='backend="flex" cannot run this call'):
        flex_path.forward(q, q, q, call_of(layout, None), False)


@pytest.mark.parametrize("backend", ["fa4", "flex"])
def test_asked_for_on_the_cpu_they_say_what_is_missing(backend):
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    with pytest.raises(RuntimeError, match=rf'backend="{backend}" cannot run here: .*GPU \(got cpu\)'):
        attend(q, k, v, layout=layout, options=KernelOptions(backend=backend))


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fa4_path.missing.cache_clear()
    if import_library("flash_attn.cute")[1] is None:
        pytest.skip("flash-attn-4 is installed")
    reason = unavailable("fa4", torch.device("cuda"), torch.bfloat16)
    fa4_path.missing.cache_clear()
    assert 'pip install -e ".[fa4]" in the clone' in reason
