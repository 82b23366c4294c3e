"""Radial maps: equal to a slow literal form of the published rule, golden densities, growth with length."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.policies import Mode, RadialPolicy, RunStep
from videosparse.policies.radial import most_blocks

GRIDS = [
    VideoGrid(7, 13, 11),
    VideoGrid(9, 16, 16),
    VideoGrid(21, 15, 17),
    VideoGrid(5, 24, 27),
    VideoGrid(12, 10, 9),
    VideoGrid(1, 20, 20),
    VideoGrid(34, 11, 7),
]


def band_of_pair(policy: RadialPolicy, tokens: int, i: int, j: int) -> torch.Tensor:
    """Bool [tokens, tokens]: the published rule for one pair of frames, token by token."""
    distance = abs(i - j)
    power = 2 ** (math.floor(math.log2(tokens)) + 1)
    rows, cols = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    if policy.sink and j == 0:
        return torch.ones(tokens, tokens, dtype=torch.bool)
    if distance <= 1:
        half = policy.first_neighbour == "half" and distance == 1
        return (cols - rows).abs() <= (tokens // 2 if half else tokens)
    level = math.floor(math.log2(distance)) + 1
    reach = power / 2**level
    if reach < 128 and distance % int(128 / reach) != 0:
        return torch.zeros(tokens, tokens, dtype=torch.bool)
    return (cols - rows).abs() <= max(max(policy.block), reach * policy.decay)


def majority_map(policy: RadialPolicy, grid: VideoGrid) -> torch.Tensor:
    """The authors' block rule with real canvases, and dense partial last blocks as in their padded runs."""
    tokens, (bq, bk) = grid.frame_tokens, policy.block
    keep = torch.zeros(ceil_div(grid.tokens, bq), ceil_div(grid.tokens, bk), dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            (p0, up), (q0, left) = divmod(i * tokens, bq), divmod(j * tokens, bk)
            high, wide = ceil_div(tokens, bq), ceil_div(tokens, bk)
            canvas = torch.zeros((high + 1) * bq, (wide + 1) * bk)
            canvas[up : up + tokens, left : left + tokens] = band_of_pair(policy, tokens, i, j).float()
            for p in range(min(high, keep.shape[0] - p0)):
                for q in range(min(wide, keep.shape[1] - q0)):
                    share = canvas[p * bq : (p + 1) * bq, q * bk : (q + 1) * bk].sum(0) / bq
                    if (share > 0).any() and (share > 1 / 3).sum() / (share > 0).sum() > 0.6:
                        keep[p0 + p, q0 + q] = True
    if grid.tokens % bq:
        keep[-1] = True
    if grid.tokens % bk:
        keep[:, -1] = True
    return keep


def any_map(policy: RadialPolicy, grid: VideoGrid) -> torch.Tensor:
    """Blocks that hold at least one token pair of a band."""
    tokens, (bq, bk) = grid.frame_tokens, policy.block
    rows, cols = ceil_div(grid.tokens, bq), ceil_div(grid.tokens, bk)
    whole = torch.zeros(rows * bq, cols * bk, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            pair = band_of_pair(policy, tokens, i, j)
            whole[i * tokens : (i + 1) * tokens, j * tokens : (j + 1) * tokens] = pair
    return whole.view(rows, bq, cols, bk).any(3).any(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize(
    ("decay", "sink", "neighbour"), [(0.2, True, "full"), (0.95, False, "full"), (1.0, False, "half")]
)
def test_equals_the_literal_rule(grid, block, decay, sink, neighbour):
    for coverage, literal in (("majority", majority_map), ("any", any_map)):
        policy = RadialPolicy(decay=decay, block=block, coverage=coverage, sink=sink, first_neighbour=neighbour)
        expected = literal(policy, grid)
        if not expected.any(1).all():
            with pytest.raises(ValueError, match="without any key"):
                policy.block_map(TokenLayout(grid))
            continue
        assert torch.equal(policy.block_map(TokenLayout(grid)).keep[0, 0], expected), coverage


@pytest.mark.parametrize(
    ("size", "policy", "dropped_full", "dropped_padded"),
    [
        ((720, 960, 81), RadialPolicy(coverage="majority", decay=0.2, first_neighbour="half"), 0.7385, 0.7352),
        ((768, 1280, 69), RadialPolicy(coverage="majority", decay=0.2), 0.7129, None),
        ((768, 1280, 69), RadialPolicy(coverage="majority", decay=0.2, first_neighbour="half"), 0.7366, None),
        ((768, 1280, 117), RadialPolicy(coverage="majority", decay=0.95, sink=False), 0.7254, None),
        ((720, 1280, 509), RadialPolicy(coverage="majority", decay=1.0, sink=False), 0.8912, None),
        ((720, 1280, 161), RadialPolicy(coverage="majority", decay=1.0), 0.7401, 0.7388),
    ],
)
def test_golden_densities(size, policy, dropped_full, dropped_padded):
    """Published of blocks of 128x128."""
    height, width, frames = size
    policy = replace(policy, block=(128, 128))
    grid = VideoGrid((frames - 1) // 4 + 1, height // 16, width // 16)
    keep = policy.block_map(TokenLayout(grid)).keep[0, 0]
    whole = grid.tokens // 128
    assert round(1 - keep[:whole, :whole].double().mean().item(), 4) == dropped_full
    if dropped_padded is not None:
        assert round(1 - keep.double().mean().item(), 4) == dropped_padded


@pytest.mark.parametrize("coverage", ["majority", "any"])
def test_kept_blocks_per_row_grow_no_faster_than_log_of_the_frames(coverage):
    """Each doubling of the length adds at most one octave of distances, and an octave costs a bounded number of blocks.

    30 x 52 tokens a frame have bands of 2048 / 2^g tokens; once that is below 128, an octave holds 2048 / 256 kept
    frames on either side, each with a band of 128 + 2 * 128 tokens for a block of rows, which touches 4 blocks.
    """
    octave = 2 * (2048 // 256) * 4

    def blocks_per_row(frames):
        policy = RadialPolicy(decay=1.0, block=(128, 128), sink=False, coverage=coverage)
        return policy.block_map(TokenLayout(VideoGrid(frames, 30, 52))).keep.float().sum(-1).mean().item()

    lengths = [21, 41, 81, 161, 321]
    kept = [blocks_per_row(n) for n in lengths]
    added = [
        (more - few) / math.log2(long / short)
        for (few, more), (short, long) in zip(pairwise(kept), pairwise(lengths), strict=True)
    ]
    assert max(added) <= octave, added


@pytest.mark.parametrize("coverage", ["any", "majority"])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (128, 64)])
@pytest.mark.parametrize("size", [(9, 16, 16), (21, 15, 17), (21, 30, 52), (7, 45, 80)])
def test_the_capacity_on_a_gpu_is_enough_and_modest(size, block, coverage):
    for text in (0, 200):
        policy = RadialPolicy(decay=0.5, block=block, coverage=coverage)
        block_map = policy.block_map(TokenLayout(VideoGrid(*size), text))
        kept = int(block_map.keep.sum())
        bound = most_blocks(policy, VideoGrid(*size), block_map)
        assert kept <= bound
        assert bound <= 2 * kept or coverage == "majority"


def test_any_is_symmetric_and_contains_no_hole_on_the_diagonal():
    policy = RadialPolicy(block=(128, 128), coverage="any", sink=False)
    keep = policy.block_map(TokenLayout(VideoGrid(23, 15, 17))).keep[0, 0]
    assert torch.equal(keep, keep.t())
    assert keep.diagonal().all()


def test_text_is_always_kept_on_blocks_of_its_own():
    layout = TokenLayout(VideoGrid(9, 15, 17), text=70)
    block_map = RadialPolicy(block=(64, 64)).block_map(layout)
    rows = ceil_div(layout.video, 64)
    assert block_map.keep.shape[2:] == (rows + 2, rows + 2)
    assert block_map.keep[..., rows:].all()
    assert block_map.keep[:, :, rows:].all()
    assert block_map.video_density(layout) < block_map.density < 1
    bare = RadialPolicy(block=(64, 64)).block_map(TokenLayout(layout.grid))
    assert torch.equal(block_map.keep[..., :rows, :rows], bare.keep)


@pytest.mark.parametrize("block", [(128, 64), (64, 128)])
@pytest.mark.parametrize("tokens", [17, 100, 127, 128, 129, 192])
def test_blocks_between_video_and_text_that_hold_nothing_are_not_kept(block, tokens):
    layout = TokenLayout(VideoGrid(3, 1, tokens), text=70)
    aligned = layout.aligned(block)
    keep = RadialPolicy(block=block).block_map(layout).keep[0, 0]
    assert keep.shape == tuple(ceil_div(aligned.length, b) for b in block)
    position = torch.arange(aligned.length)
    used = aligned.key_mask(1, "cpu")[0]
    rows, columns = ((position[used] // b).unique() for b in block)
    assert int(keep.sum()) == int(keep[rows][:, columns].sum())
    assert keep[rows[-1]][columns].all()
    assert keep[rows][:, columns[-1]].all()


def test_cached_by_everything_the_map_depends_on():
    small, large = TokenLayout(VideoGrid(9, 15, 17)), TokenLayout(VideoGrid(10, 15, 17))
    policy = RadialPolicy()
    assert policy.block_map(small) is policy.block_map(small)
    assert policy.block_map(large).keep.shape != policy.block_map(small).keep.shape
    wide = TokenLayout(VideoGrid(9, 30, 52))
    maps = [RadialPolicy(decay=decay, block=(64, 64)).block_map(wide).keep for decay in (0.1, 1.0)]
    assert maps[0].sum() < maps[1].sum()
    with torch.inference_mode():
        made = RadialPolicy(decay=0.33).block_map(small)
    assert not made.keep.is_inference()


def test_plan_is_sparse_and_aligned():
    layout = TokenLayout(VideoGrid(9, 15, 17), text=70, seq_lens=torch.tensor([2300], dtype=torch.int32))
    plan = RadialPolicy().plan(layout, RunStep("cond", 0), 0, {}, device=torch.device("cpu"))
    assert plan.mode == Mode.SPARSE
    assert plan.layout.text_start % 128 == 0
    assert plan.layout.seq_lens.item() - plan.layout.text_start == 2300 - layout.video
    assert plan.index.q_len == plan.layout.length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -1}, "decay must be positive"),
        ({"decay": float("nan")}, "decay must be positive"),
        ({"block": (100, 100)}, "each 64 or 128"),
        ({"coverage": "most"}, "majority or any"),
        ({"first_neighbour": "third"}, "full or half"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RadialPolicy(**arguments)


def test_sink_is_a_bool():
    with pytest.raises(TypeError, match="must be True or False"):
        RadialPolicy(sink="no")


def test_majority_refuses_grids_that_would_leave_empty_rows():
    with pytest.raises(ValueError, match="without any key"):
        RadialPolicy(sink=False, coverage="majority").block_map(TokenLayout(VideoGrid(64, 5, 6)))
    assert RadialPolicy(sink=False, coverage="any").block_map(TokenLayout(VideoGrid(64, 5, 6))).keep.any(-1).all()
