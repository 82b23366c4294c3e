"""Radial Attention (arXiv 2506.19852): static maps whose width shrinks with distance in time, O(n log n) work.

Two tokens of latent frames i and j attend when their raster positions inside the frame are close enough: the further
apart the frames, the narrower the band, and far frames are read only every so often. This file turns that rule on
tokens into blocks in closed form, block by block, so that nothing of size (tokens per frame)^2 or tokens^2 exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch

from videosparse.blocks import BlockIndex, BlockMap, check_block
from videosparse.checking import check_device, check_flag, check_number
from videosparse.layout import TokenLayout, VideoGrid, ceil_div, check_grid, check_is_layout
from videosparse.policies.base import BLOCK, LayerPlan, LayerState, Mode, RunStep, SparsityPolicy, check_call
from videosparse.uploading import upload

COVERAGES = ("majority", "any")
NEIGHBOURS = ("full", "half")

# The published constants: bands narrower than this many tokens are thinned out instead (whatever the block is), and a
# block is kept when more than .6 of its touched columns have more than a third of their rows inside the band.
_THIN_BELOW = 128

# Work is cut into slabs of this many block pairs, so that temporaries stay near 100 MB at any length.
_SLAB = 2**22


@dataclass(frozen=True)
class RadialPolicy(SparsityPolicy):
    """Radial Attention.

    Args:
        decay: factor on the band width of frame pairs two or more apart, > 0; larger is denser. Published: 0.2 (Wan
            2.1), 0.8 (Wan 2.2), 0.95 (HunyuanVideo), 1 (with a length-extension LoRA).
        block: (query rows, key rows) of a block, each 64 or 128. Published: (128, 128), and (64, 64) for Wan 2.2. With
            (128, 64) no pair of tokens inside the bands is lost either, and real models keep up to 10 % fewer blocks
            than with (128, 128).
        coverage: when a block counts as inside a band. "any", the default, keeps a block as soon as one of its token
            pairs is inside: symmetric in time, no pair is lost. "majority" is the rule of the authors' code, to be
            taken for the published densities: 8 to 22 % fewer blocks on real models. Where a frame is no whole number
            of blocks it drops most of what a block on a frame's border holds, which on the embedded model at 255
            tokens a frame tripled the error (assets/results/radial_coverage.csv).
        sink: every query reads all of latent frame 0 (published for Wan, not for HunyuanVideo).
        first_neighbour: "full" lets adjacent frames attend fully; "half" keeps half a frame, as the authors' code did
            for Wan until late 2025.

    Raises:
        TypeError: a value of another type.
        ValueError: decay not positive and finite, or an unknown block, coverage or first_neighbour.

    Source: section 4 of the paper, and the band, decimation and block rules of the authors' code, whose tables are
    the published ones. Differs from the code in: text starts on a fresh block, so no video block is dense because text
    shares it; `block[0] != block[1]` is allowed, the larger one then bounds the band from below;
    neighbouring frames are never thinned out, as they are by the published rule where frames have under 128 tokens.
    """

    decay: float = 1.0
    block: tuple[int, int] = BLOCK
    coverage: str = "any"
    sink: bool = True
    first_neighbour: str = "full"

    name: ClassVar[str] = "radial"
    pure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_block(self.block)
        check_number("decay", self.decay)
        if not (self.decay > 0 and math.isfinite(self.decay)):
            raise ValueError(f"decay must be positive and finite (got {self.decay}); published values lie in 0.2..1.")
        check_flag("sink", self.sink)
        for name, known in (("coverage", COVERAGES), ("first_neighbour", NEIGHBOURS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)} (got {getattr(self, name)!r}).")

    def plan(
        self,
        layout: TokenLayout,
        run: RunStep,
        layer: int,
        state: LayerState,
        *,
        device: torch.device,
        samples: int = 1,
        heads: int = 1,
    ) -> LayerPlan:
        """Sparse, on the one map of this layout: nothing depends on step, layer or data.

        Raises:
            TypeError, ValueError: an argument of another type; and as `block_map`.
        """
        check_call(layout, run, layer, state, device, samples, heads)
        aligned = layout.aligned(self.block)
        return LayerPlan(Mode.SPARSE, aligned, self.block_index(layout, device))

    def static_map(self, layout: TokenLayout, device: torch.device | str = "cpu") -> BlockMap:
        """See `block_map`."""
        return self.block_map(layout, device)

    def block_map(self, layout: TokenLayout, device: torch.device | str = "cpu") -> BlockMap:
        """The map of a layout, bool [1, 1, Mq, Nk] for all samples and heads; text rows and columns are kept.

        Covers `layout.aligned(block)`, whose text starts on a fresh block of either kind: between it and the video a
        row or column of the smaller kind may hold no token and keeps nothing. Built on `device` without any
        token-by-token tensor, and cached.

        Raises:
            TypeError: layout is no `TokenLayout`, or device neither a device nor a name.
            ValueError: device names none; "majority" would leave a query block without keys (frames much smaller than a
                block).
        """
        check_is_layout(layout)
        return _cached_map(self, layout.grid, layout.text, _indexed(device))

    def block_index(self, layout: TokenLayout, device: torch.device | str = "cpu") -> BlockIndex:
        """The query-major lists of `block_map`, cached on their own: a run reads no map. Errors are as there."""
        check_is_layout(layout)
        return _cached_index(self, layout.grid, layout.text, _indexed(device))

    def band(self, grid: VideoGrid) -> list[int]:
        """Half-width of the band in raster tokens for frames 0, 1, 2, ... apart; -1 where the pair is dropped.

        Raises:
            TypeError: grid is no `VideoGrid`.
        """
        check_grid("grid", grid)
        tokens, narrowest = grid.frame_tokens, max(self.block)
        power = 1 << tokens.bit_length()
        widths = []
        for distance in range(grid.frames):
            reach = power / (1 << distance.bit_length())
            dropped = reach < _THIN_BELOW and distance % int(_THIN_BELOW / reach) != 0
            widths.append(-1 if dropped else int(max(narrowest, reach * self.decay)))
        for distance in range(min(2, grid.frames)):
            widths[distance] = tokens
        if self.first_neighbour == "half" and grid.frames > 1:
            widths[1] = tokens // 2
        return widths


@dataclass(frozen=True)
class _Pieces:
    """Parts of blocks that lie inside one frame, at most one per block: tensors int32 [n] on the device."""

    number: torch.Tensor  # of the block
    frame: torch.Tensor
    start: torch.Tensor  # first raster position inside the frame
    stop: torch.Tensor  # one past the last
    first: int | None  # number of the first block where the others follow without a gap, else None

    def __len__(self) -> int:
        return self.number.shape[0]


def _pieces(grid: VideoGrid, block: int, cut: bool, device: torch.device) -> list[_Pieces]:
    """Each block's part in the first frame that it touches, then in its second, and so on.

    With `cut`, only the first ceil(tokens / block) blocks that a frame touches see it, as in the authors' code: the
    block at its end may lose the rest of that frame.
    """
    # in NumPy: on many cores torch hands even a search among thousands to all of its threads
    tokens = grid.frame_tokens
    begin = np.arange(grid.frames) * tokens
    touched = (begin + tokens - 1) // block - begin // block + 1
    if cut:
        touched = np.minimum(touched, ceil_div(tokens, block))
    frame = np.repeat(np.arange(grid.frames), touched)
    nth = np.arange(len(frame)) - (touched.cumsum() - touched)[frame]
    number = begin[frame] // block + nth
    start = nth * block - begin[frame] % block
    columns = np.stack([number, frame, np.maximum(start, 0), np.minimum(start + block, tokens)])
    rank = np.arange(len(frame)) - np.searchsorted(number, number)  # numbers ascend: how often this one came
    return [_place(columns[:, rank == r], device) for r in range(int(rank.max()) + 1)]


def _place(columns: np.ndarray, device: torch.device) -> _Pieces:
    first, last = int(columns[0, 0]), int(columns[0, -1])
    number, frame, start, stop = upload(torch.tensor(columns, dtype=torch.int32), device)
    return _Pieces(number, frame, start, stop, first if last - first + 1 == columns.shape[1] else None)


def _inside_any(row: _Pieces, col: _Pieces, width: torch.Tensor) -> torch.Tensor:
    """Whether any token pair of two pieces is within `width`; broadcasts to [rows, columns]."""
    right = col.start - (row.stop[:, None] - 1)
    left = row.start[:, None] - (col.stop - 1)
    return torch.maximum(right, left).clamp_(min=0) <= width


def _inside_majority(row: _Pieces, col: _Pieces, width: torch.Tensor, block_rows: int) -> torch.Tensor:
    """The authors' rule: of the columns the band touches, more than .6 have over a third of their rows inside it.

    A column x holds min(stop, x + w + 1) - max(start, x - w) rows of the band, a trapezoid in x; so the columns that
    hold at least `enough` rows are an interval, and so are those that hold any.
    """
    start, stop = row.start[:, None], row.stop[:, None]
    enough = block_rows // 3 + 1
    touched = torch.minimum(col.stop, stop + width) - torch.maximum(col.start, start - width)
    filled = torch.minimum(col.stop, stop - enough + width + 1) - torch.maximum(col.start, start + enough - 1 - width)
    possible = (stop - start >= enough) & (2 * width + 1 >= enough)
    return possible & (5 * filled > 3 * touched) & (filled > 0)


def _video_map(policy: RadialPolicy, grid: VideoGrid, device: torch.device) -> torch.Tensor:
    """bool [ceil(V / rows), ceil(V / columns)] of a video."""
    (block_q, block_k), majority = policy.block, policy.coverage == "majority"
    keep = torch.zeros(ceil_div(grid.tokens, block_q), ceil_div(grid.tokens, block_k), dtype=torch.bool, device=device)
    bands = upload(torch.tensor(policy.band(grid), dtype=torch.int32), device)
    column_ranks = _pieces(grid, block_k, majority, device)
    for rows in _pieces(grid, block_q, majority, device):
        for row in _slabs(rows, keep.shape[1]):
            for col in column_ranks:
                width = bands[(row.frame[:, None] - col.frame).abs()]
                if policy.sink:
                    width = torch.where(col.frame == 0, grid.frame_tokens, width)
                inside = _inside_majority(row, col, width, block_q) if majority else _inside_any(row, col, width)
                _add(keep, row, col, inside & (width >= 0))
    if majority:
        _keep_partial(keep, grid.tokens, policy)
    return keep


def _add(keep: torch.Tensor, row: _Pieces, col: _Pieces, more: torch.Tensor) -> None:
    """Keep the blocks of these rows and columns where `more` says so."""
    if row.first is not None and col.first is not None:  # nearly all of them, and no gather
        keep[row.first : row.first + len(row), col.first : col.first + len(col)] |= more
    else:
        # the numbers of one rank are distinct, so this reads and writes each block once
        where = row.number.long()[:, None], col.number.long()
        keep[where] = keep[where] | more


def _slabs(rows: _Pieces, columns: int) -> list[_Pieces]:
    size = max(1, _SLAB // columns)
    slabs = []
    for begin in range(0, len(rows), size):
        parts = (t[begin : begin + size] for t in (rows.number, rows.frame, rows.start, rows.stop))
        number, frame, start, stop = parts
        slabs.append(_Pieces(number, frame, start, stop, None if rows.first is None else rows.first + begin))
    return slabs


def _keep_partial(keep: torch.Tensor, tokens: int, policy: RadialPolicy) -> None:
    """Keep the partial last row and column, as the authors' padded runs do; then no row may be empty."""
    if tokens % policy.block[0]:
        keep[-1] = True
    if tokens % policy.block[1]:
        keep[:, -1] = True
    if not bool(keep.any(1).all()):
        raise ValueError(
            "coverage='majority' leaves query blocks without any key on this grid: its frames are much smaller than a "
            f"block of {policy.block}; use coverage='any', or block=(64, 64)."
        )


def most_blocks(policy: RadialPolicy, grid: VideoGrid, block_map: BlockMap) -> int:
    """No fewer blocks than the map keeps, from sizes alone."""
    (block_q, block_k), tokens = policy.block, grid.frame_tokens
    _, _, rows, columns = block_map.keep.shape
    bands = policy.band(grid)
    # a run of n tokens that starts anywhere touches at most this many blocks
    touched = [0 if w < 0 else (min(tokens, block_q + 2 * w) - 2) // block_k + 2 for w in bands]
    frame_rows = (tokens - 2) // block_q + 2
    apart = [grid.frames, *(2 * (grid.frames - d) for d in range(1, grid.frames))]  # pairs of frames, by distance
    pairs = sum(n * blocks for n, blocks in zip(apart, touched, strict=True))
    full = (tokens - 2) // block_k + 2
    sink = full * grid.frames if policy.sink else 0
    video = ceil_div(grid.tokens, block_q), ceil_div(grid.tokens, block_k)
    text = rows * columns - video[0] * video[1]
    edge = sum(video) if policy.coverage == "majority" else 0
    return min(rows * columns, frame_rows * (pairs + sink) + edge + text)


def _indexed(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" alone means another one after `torch.cuda.set_device`."""
    device = check_device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _build(policy: RadialPolicy, grid: VideoGrid, text: int, device: torch.device) -> BlockMap:
    # plain tensors also when the caller is in inference mode: the next caller may be training
    with torch.inference_mode(False):
        layout = TokenLayout(grid, text).aligned(policy.block)
        video = _video_map(policy, grid, device)
        keep = video.new_zeros([ceil_div(layout.length, b) for b in policy.block])
        rows, columns = video.shape
        keep[:rows, :columns] = video
        if text:
            # it starts on a fresh block of either kind, so smaller ones between it and the video may hold nothing
            row, column = (layout.text_start // b for b in policy.block)
            keep[row:, :columns] = keep[:rows, column:] = keep[row:, column:] = True
        return BlockMap(keep[None, None], policy.block, layout.length, layout.length)


# By everything that a map depends on. Few maps, for pictures and reports; more lists, which are small: 6 MB for
# 460,800 tokens.
@lru_cache(maxsize=2)
def _cached_map(policy: RadialPolicy, grid: VideoGrid, text: int, device: torch.device) -> BlockMap:
    return _build(policy, grid, text, device)


@lru_cache(maxsize=16)
def _cached_index(policy: RadialPolicy, grid: VideoGrid, text: int, device: torch.device) -> BlockIndex:
    with torch.inference_mode(False):
        found = _build(policy, grid, text, device)
        # counting the blocks would wait for a GPU
        return found.index(most_blocks(policy, grid, found) if device.type == "cuda" else None)
