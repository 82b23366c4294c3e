"""block_sums: the mass of every block, against the whole probability matrix."""

import pytest
import torch
from inputs import BLOCKS, LAYOUTS, assert_sums_accurate, expected_sums, make_layout, make_map, make_qkv

from videosparse.blocks import BlockMap
from videosparse.kernels import attend, block_sums, torch_path
from videosparse.kernels.accuracy import allowed_error, worst_row


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_block_sums_are_exact(kind, block, monkeypatch):
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 60_000)  # several strips of rows
    layout = make_layout(kind).aligned(block)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    found = block_sums(q, k, lse, layout=layout, block=block)
    assert_sums_accurate(found, q, k, lse, layout, block)


def assert_tokens(sums, tokens, lse):
    """Sums are as exact as the fp32 lse that every term repeats: a few units in its last place."""
    unit = torch.finfo(torch.float32).eps * lse[lse.isfinite()].abs().max()
    torch.testing.assert_close(sums, tokens, rtol=4 * unit.item(), atol=0)


def test_rows_sum_to_their_tokens():
    layout = make_layout("ragged text").aligned((64, 64))
    q, k, v = make_qkv(layout, torch.bfloat16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    tokens = torch.nn.functional.pad(layout.key_mask(2, "cpu").float(), (0, -layout.length % 64))
    tokens = tokens.view(2, 1, -1, 64).sum(3).expand(-1, 3, -1)
    sums = block_sums(q, k, lse, layout=layout, block=(64, 64)).sum(3)
    assert_tokens(sums, tokens, lse)


def test_rows_without_keys_count_nothing():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    block_map = make_map(layout, (64, 64))
    block_map.keep[:, :, [0, 2, 3], 0] = True
    _, lse = attend(q, k, v, layout=layout, index=block_map.index(), return_lse=True)
    sums = block_sums(q, k, lse, layout=layout, block=(64, 64))
    assert (sums[:, :, 1] == 0).all()
    # what the map kept has all the mass that its lse saw
    kept = (sums * block_map.keep).sum(3)[:, :, [0, 2, 3]]
    assert_tokens(kept, torch.full_like(kept, 64.0), lse)


def test_scale_is_respected():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    _, lse = attend(q, k, v, layout=layout, return_lse=True, scale=0.3)
    sums = block_sums(q, k, lse, layout=layout, block=(64, 64), scale=0.3)
    assert_tokens(sums.sum(3)[:, :, :4], torch.full((2, 3, 4), 64.0), lse)


def test_full_map_of_sums_is_not_empty():
    layout = make_layout("video")
    q, k, v = make_qkv(layout, torch.float32)
    _, lse = attend(q, k, v, layout=layout, index=BlockMap.full(layout, (64, 64)).index(), return_lse=True)
    assert (block_sums(q, k, lse, layout=layout, block=(64, 64)) > 0).all()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sample", [8, 64])
def test_sums_over_some_rows(kind, block, sample, monkeypatch):
    """The visited rows, alone, times the valid rows of a block over the visited ones."""
    monkeypatch.setattr(torch_path, "SCORE_ENTRIES", 20_000)
    layout = make_layout(kind).aligned(block)
    q, k, v = make_qkv(layout, torch.float32, dim=16)
    _, lse = attend(q, k, v, layout=layout, return_lse=True)
    found = block_sums(q, k, lse, layout=layout, block=block, sample=sample)
    valid = layout.key_mask(2, "cpu")
    visited = valid & (torch.arange(layout.length) % (block[0] // sample) == 0)
    counts = [torch.nn.functional.pad(x, (0, -layout.length % block[0])).unflatten(1, (-1, block[0])).sum(2)
              for x in (valid, visited)]  # fmt: skip
    factor = (counts[0] / counts[1].clamp(min=1))[:, None, :, None].double()
    seen = lse.masked_fill(~visited[:, None], -torch.inf)
    truth, plain = (expected_sums(q, k, seen, layout, block, t) for t in (torch.float64, torch.float32))
    assert worst_row(found, truth * factor) <= allowed_error(truth * factor, plain * factor.float())
    if sample == block[0]:
        assert torch.equal(found, block_sums(q, k, lse, layout=layout, block=block))


def test_samples_that_are_refused():
    layout = make_layout("video")
    q, k, _ = make_qkv(layout, torch.float32)
    for sample in (7, 0, 128, True):
        with pytest.raises(ValueError, match="sample must be one of 8, 16, 32, 64 rows of a block, or None for all"):
            block_sums(q, k, torch.zeros(2, 3, layout.length), layout=layout, block=(64, 64), sample=sample)
