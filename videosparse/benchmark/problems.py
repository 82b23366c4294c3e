"""What is timed: a sequence, a block map of a given kind, and fresh random inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from videosparse.blocks import BlockIndex, BlockMap
from videosparse.cases import CASES
from videosparse.kernels.call import AttentionCall
from videosparse.layout import TokenLayout, ceil_div
from videosparse.policies import RadialPolicy


@dataclass(frozen=True)
class Workload:
    """A sequence and the heads that attend over it.

    Args:
        name: of the model and size, or heads x tokens.
        layout: without a gap; lists are made for `layout.aligned(block)`.
        heads, head_dim: of the attention.
        share: "shared" (one map for all heads) or "per head".
    """

    name: str
    layout: TokenLayout
    heads: int
    head_dim: int = 128
    share: str = "shared"


@dataclass(frozen=True)
class Entry:
    """One kernel on one map.

    Args:
        kernel: see `CONTENDERS`.
        policy: which blocks are kept: "dense" (no lists), "full" (lists of everything), "uniform" (equally many random
            blocks in each row), "two dense rows", "u^2" (counts of rows in proportion to the square of a random
            number), or "radial", with the settings that users of the model get but for the block.
        density: kept / all blocks that is asked of random maps.
        block: (query rows, key rows).
    """

    kernel: str
    policy: str = "dense"
    density: float = 1.0
    block: tuple[int, int] = (128, 128)


def counts_of_rows(policy: str, rows: int, columns: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """int64 [rows] on the CPU, blocks kept in each row; every policy of one density has about the same total."""
    total = density * rows * columns
    if policy == "two dense rows":
        counts = torch.full((rows,), max(1.0, (total - 2 * columns) / max(1, rows - 2)), dtype=torch.float64)
        counts[torch.randperm(rows, generator=generator)[:2]] = columns
    elif policy == "u^2":
        weight = torch.rand(rows, generator=generator, dtype=torch.float64).square()
        counts = weight * total / weight.sum()
        for _ in range(20):  # what exceeds a full row goes to the others
            counts = counts.clamp(1, columns)
            free = (counts > 1) & (counts < columns)
            counts[free] += (total - counts.sum()) / max(1, int(free.sum()))
    else:
        counts = torch.full((rows,), total / rows, dtype=torch.float64)
    return counts.round().clamp(1, columns).long()


def random_map(workload: Workload, entry: Entry, device: torch.device, seed: int) -> BlockMap:
    """A random map of the policy and density of `entry`; rows and columns of text are kept."""
    layout = workload.layout.aligned(entry.block)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (ceil_div(layout.length, b) for b in entry.block)
    heads = workload.heads if workload.share == "per head" else 1
    keep = torch.empty(1, heads, rows, columns, dtype=torch.bool, device=device)
    torch.manual_seed(seed)
    for head in range(heads):
        counts = counts_of_rows(entry.policy, rows, columns, entry.density, generator).to(device)
        rank = torch.rand(rows, columns, device=device).argsort(-1).argsort(-1)
        keep[0, head] = rank < counts[:, None]
    if layout.text:
        keep[:, :, layout.text_start // entry.block[0] :] = True
        keep[..., layout.text_start // entry.block[1] :] = True
    return BlockMap(keep, entry.block, layout.length, layout.length)


def make_map(workload: Workload, entry: Entry, device: torch.device, seed: int) -> BlockMap | None:
    """The map of an entry; None for a call without lists."""
    if entry.policy == "dense":
        return None
    if entry.policy == "full":
        return BlockMap.full(workload.layout.aligned(entry.block), entry.block, device)
    if entry.policy == "radial":
        return radial(workload.name, entry.block).block_map(workload.layout, device)
    return random_map(workload, entry, device, seed)


def radial(name: str, block: tuple[int, int]) -> RadialPolicy:
    """Radial Attention with the defaults of the model that a workload is named after, except for the block."""
    from videosparse.processors import RadialProcessor  # the only part that needs Diffusers

    policy = RadialProcessor().resolve(CASES[name].model).policy
    assert isinstance(policy, RadialPolicy)
    return replace(policy, block=block)


@dataclass(eq=False)
class Problem:
    """Inputs of one entry: q, k, v [1, L, H, D] for its own layout, with NaN in the gap before text."""

    workload: Workload
    entry: Entry
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    block_map: BlockMap | None

    @cached_property
    def index(self) -> BlockIndex | None:
        """Lists of the map."""
        return None if self.block_map is None else self.block_map.index()

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v."""
        return self.q, self.k, self.v

    @property
    def call(self) -> AttentionCall:
        """For kernels below `attend`."""
        return AttentionCall.of(self.layout, self.index, self.q.shape[3] ** -0.5)

    @property
    def density(self) -> float:
        """Kept / all blocks."""
        return 1.0 if self.block_map is None else self.block_map.density

    @property
    def pairs(self) -> float:
        """Query-key pairs in visited blocks, over all heads."""
        return self.density * self.q.shape[1] ** 2 * self.q.shape[0] * self.q.shape[2]


class Inputs:
    """Random tensors of a set, shared by the entries that have the same layout, and maps of the same kind."""

    def __init__(self, workload: Workload, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.workload, self.device, self.dtype, self.seed = workload, device, dtype, seed
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._maps: dict[Entry, BlockMap | None] = {}

    def of(self, entry: Entry) -> Problem:
        """The problem of an entry."""
        layout = self.workload.layout if entry.policy == "dense" else self.workload.layout.aligned(entry.block)
        if layout.length not in self._tensors:
            self._tensors[layout.length] = self._make(layout)
        what = replace(entry, kernel="")
        if what not in self._maps:
            self._maps[what] = make_map(self.workload, entry, self.device, self.seed)
        return Problem(self.workload, entry, *self._tensors[layout.length], layout, self._maps[what])

    def _make(self, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (1, layout.length, self.workload.heads, self.workload.head_dim)
        q, k, v = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(3))
        for x in (q, k, v):
            x[:, layout.video : layout.text_start] = torch.nan
        return q, k, v
