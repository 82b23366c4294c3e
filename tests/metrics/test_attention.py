"""Recall and error of block maps, on constructed masses."""

import pytest
import torch

from videosparse.blocks import BlockMap
from videosparse.kernels import attend, block_sums
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.metrics.attention import attention_recall, best_map, map_of, output_error, random_map

BLOCK = (64, 64)
LAYOUT = TokenLayout(VideoGrid(3, 9, 10), 40, seq_lens=torch.tensor([277, 310], dtype=torch.int32)).aligned(BLOCK)
VIDEO = 5  # blocks of 270 tokens; text adds one


@pytest.fixture
def call():
    q, k, v = (torch.randn(2, LAYOUT.length, 3, 16) for _ in range(3))
    dense, lse = attend(q, k, v, layout=LAYOUT, return_lse=True)
    return q, k, v, dense, block_sums(q, k, lse, layout=LAYOUT, block=BLOCK)


def test_everything_kept_is_everything(call):
    q, k, v, dense, sums = call
    full = BlockMap.full(LAYOUT, BLOCK)
    torch.testing.assert_close(attention_recall(sums, full, LAYOUT), torch.ones(2, 3))
    out = attend(q, k, v, layout=LAYOUT, index=full.index())
    assert output_error(out, dense, LAYOUT).max() < 1e-5


def test_recall_is_the_kept_share():
    sums = torch.ones(1, 1, 6, 6)
    sums[..., 0] = 5.0
    keep = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    keep[..., 0] = True
    keep[:, :, 5] = True  # a row of text, which does not count
    found = attention_recall(sums, BlockMap(keep, BLOCK, LAYOUT.length, LAYOUT.length), LAYOUT)
    assert found.item() == pytest.approx(0.5)


@pytest.mark.parametrize("density", [0.2, 0.4, 0.6, 1.0])
def test_the_best_map_beats_every_other(call, density):
    sums = call[4]
    best = best_map(sums, density, LAYOUT, BLOCK)
    assert (best.keep[:, :, :VIDEO, :VIDEO].sum((1, 2, 3)) == round(density * 3 * VIDEO * VIDEO)).all()
    assert best.keep[:, :, VIDEO:].all()
    assert best.keep[..., VIDEO:].all()
    assert best.keep.any(3).all()
    for seed in range(5):
        other = random_map(sums, density, LAYOUT, BLOCK, seed)
        assert (other.keep[:, :, :VIDEO, :VIDEO].sum(3) == round(density * VIDEO)).all()
        better, worse = (attention_recall(sums, m, LAYOUT).mean(1) for m in (best, other))
        assert (better >= worse).all()


def test_random_maps_repeat(call):
    maps = [random_map(call[4], 0.4, LAYOUT, BLOCK, seed).keep for seed in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_lists_know_their_map(call):
    block_map = random_map(call[4], 0.4, LAYOUT, BLOCK, 0)
    assert torch.equal(map_of(block_map.index(10_000)).keep, block_map.keep)


def test_error_of_a_wrong_output(call):
    dense = call[3].clone()
    dense[:, LAYOUT.video :] = 0  # text is not asked about
    torch.testing.assert_close(output_error(1.25 * call[3], dense, LAYOUT), torch.full((2, 3), 0.25))
