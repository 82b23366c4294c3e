"""A search of AdaSpa as `eval/bench_search.py` times it: the problem, and checks of everything that it calls."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from videosparse.benchmark.checks import picked_rows
from videosparse.benchmark.contenders import Call
from videosparse.benchmark.timing import quantiles
from videosparse.blocks import BlockIndex, PackedIndex
from videosparse.cases import CASES, Case
from videosparse.kernels import attend, block_sums, selection, torch_select
from videosparse.kernels.accuracy import allowed_error, measure, worst_row
from videosparse.kernels.selection import Selection
from videosparse.layout import TokenLayout, ceil_div

DENSITY = 0.2

Check = Callable[[Any], tuple[float, float]]
"""(error, the largest allowed one) of what a call returned."""


@dataclass(eq=False)
class Timed:
    """A call to time, how to check it, and its row."""

    row: dict[str, Any]
    call: Call
    check: Check
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """In ms; NaN where it was not timed."""
        return quantiles(self.times)[1] if self.times else float("nan")


@dataclass(eq=False)
class Problem:
    """One attention call, q, k and v [1, L, H, D] with NaN in the gap before text, and a search of it.

    Args:
        case: model and grid.
        block: (query rows, key rows).
        q, k, v: bf16.
        layout: text on a fresh block.
    """

    case: Case
    block: tuple[int, int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout

    @cached_property
    def lse(self) -> torch.Tensor:
        """fp32 [1, H, L]."""
        return attend(self.q, self.k, self.v, layout=self.layout, return_lse=True)[1]

    @cached_property
    def sums(self) -> torch.Tensor:
        """fp32 [1, H, Mq, Nk]."""
        return block_sums(self.q, self.k, self.lse, layout=self.layout, block=self.block)

    @property
    def selection(self) -> Selection:
        """Base density .2, as `AdaSpaProcessor` selects by default."""
        rows, columns = (ceil_div(self.layout.video, b) for b in self.block)
        base = round(DENSITY * columns)
        return Selection(rows, columns, base, round(DENSITY / 2 * columns), round(1.5 * DENSITY * columns), 0.8)

    @cached_property
    def index(self) -> PackedIndex:
        """The map that a search finds."""
        return self.select("auto")

    @cached_property
    def lists(self) -> BlockIndex:
        """Its lists."""
        return selection.expand(self.index)

    def select(self, backend: str) -> PackedIndex:
        """A new map of the sums."""
        batch, heads, rows, columns = self.sums.shape
        capacity = self.selection.capacity((batch, heads, rows, columns))
        index = PackedIndex.allocate(self.layout, self.block, 1, heads, capacity, self.q.device)
        selection.select(self.sums, index, self.selection, backend)
        return index

    @property
    def density(self) -> float:
        """Kept / all blocks of the map."""
        samples, heads, rows, columns = self.index.shape
        return int(self.index.row_ptr[-1]) / (samples * heads * rows * columns)

    def tokens(self, layout: TokenLayout) -> list[torch.Tensor]:
        """q, k and v as a layout of the same tokens has them."""
        if layout.length == self.layout.length:
            return [self.q, self.k, self.v]
        start = self.layout.text_start
        return [torch.cat([x[:, : self.layout.video], x[:, start:]], 1) for x in (self.q, self.k, self.v)]

    def row(self, kernel: str, sample: int | None = None, density: float = 1.0) -> dict[str, Any]:
        """What a row of this problem says first."""
        layout, (_, _, heads, head_dim) = self.layout, self.q.shape
        return {
            "case": self.case.name, "tokens": layout.length, "text": layout.text, "batch": 1, "heads": heads,
            "head_dim": head_dim, "dtype": "bfloat16", "block": "x".join(map(str, self.block)), "kernel": kernel,
            "sample": sample or "", "policy": "adaspa", "density": f"{density:.4f}",
        }  # fmt: skip


def make_problems(name: str, blocks: tuple[tuple[int, int], ...], device: torch.device) -> list[Problem]:
    """A problem for each block, all on the same tensors."""
    case = CASES[name]
    layout = case.layout().aligned((128, 128))
    shape = (1, layout.length, case.model.heads, case.model.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    for x in (q, k, v):
        x[:, layout.video : layout.text_start] = torch.nan
    return [Problem(case, block, q, k, v, layout) for block in blocks]


def check_attention(p: Problem, sparse: bool, layout: TokenLayout | None = None) -> Check:
    """Some rows of two heads against fp64."""
    heads, layout = [0, p.q.shape[2] - 1], layout or p.layout

    def check(found: Any) -> tuple[float, float]:
        out = found[0] if isinstance(found, tuple) else found
        tensors = [x[:, :, heads] for x in p.tokens(layout)]
        block_map = None
        if sparse:
            whole = p.index.block_map()
            block_map = type(whole)(whole.keep[:, heads], whole.block, whole.q_len, whole.kv_len)
        rows = picked_rows(layout.length, out.device)
        judged = measure(out[:, :, heads], None, *tensors, layout=layout, block_map=block_map, rows=rows)
        return (judged.error if judged.empty_rows else float("nan")), judged.allowed

    return check


def check_sums(p: Problem, sample: int | None) -> Check:
    """Some block rows of two heads against fp64 of the same visited rows; plain torch computes in fp32."""

    def check(sums: torch.Tensor) -> tuple[float, float]:
        rows = torch.arange(sums.shape[2], device=sums.device)[:: max(1, sums.shape[2] // 6)]
        found = sums[:, [0, -1]][:, :, rows]
        truth, plain = (expected_sums(p, rows, sample, dtype) for dtype in (torch.float64, torch.float32))
        return worst_row(found, truth), allowed_error(truth, plain)

    return check


def expected_sums(p: Problem, rows: torch.Tensor, sample: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Sums [1, 2, rows, Nk] of block rows of the first and the last head, in a given precision."""
    length, (high, wide) = p.layout.length, p.block
    valid = torch.nn.functional.pad(p.layout.key_mask(1, p.q.device)[0], (0, -length % 128))
    place = rows[:, None] * high + torch.arange(high, device=rows.device)
    seen = place[:, :: high // (sample or high)]
    factor = valid[place].sum(1) / valid[seen].sum(1).clamp(min=1)
    at = seen.clamp(max=length - 1)
    q, k = (x[:, :, [0, -1]].nan_to_num(0.0).to(dtype) for x in (p.q, p.k))
    level = p.lse[:, [0, -1]][:, :, at].to(dtype)
    sums = q.new_empty(1, 2, rows.numel(), ceil_div(length, wide))
    for i in range(rows.numel()):  # scores of one block row at a time
        scores = torch.einsum("blhd,bmhd->bhlm", q[:, at[i]], k) * p.q.shape[3] ** -0.5
        counts = valid[seen[i]][:, None] & valid[:length]
        mass = torch.exp(scores - level[:, :, i, :, None]).masked_fill(~counts, 0.0)
        mass = torch.nn.functional.pad(mass, (0, -length % wide))
        sums[:, :, i] = mass.view(*mass.shape[:3], -1, wide).sum((2, 4)) * factor[i]
    return sums


def check_selected(p: Problem) -> Check:
    """Blocks that differ from those that torch selects."""

    def check(_: Any) -> tuple[float, float]:
        expected = p.select("torch")
        pairs = [(getattr(p.index, name), getattr(expected, name)) for name in ("bits", "row_ptr", "order")]
        return float(sum(int((x != y).sum()) for x, y in pairs)), 0.0

    return check


def check_lists(p: Problem) -> Check:
    """Entries that differ from those of torch."""

    def check(found: BlockIndex) -> tuple[float, float]:
        index = p.index
        total = int(index.row_ptr[-1])
        ids = torch_select.expand(index.bits, index.row_ptr, index.capacity, index.shape[3])
        return float((ids[:total] != found.ids[:total]).sum()), 0.0

    return check


def is_right(timed: Timed) -> bool:
    """Run a call once and check what it returned; says in the row what is wrong."""
    try:
        error, allowed = timed.check(timed.call())
        timed.row |= {"error": f"{error:.2e}", "allowed": f"{allowed:.2e}"}
        if not error <= allowed:
            timed.row["note"] = "error above allowed: not timed"
        return bool(error <= allowed)
    except Exception as failure:  # one call must not take the others along
        traceback.print_exc()
        timed.row["note"] = f"failed: {type(failure).__name__}: {str(failure)[:200]}"
        return False
