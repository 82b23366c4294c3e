"""What AdaSpa's search costs on a GPU, kernel by kernel and as a share of a whole run's attention.

    python eval/bench_search.py                                     all cases, about 100 seconds of one H200
    python eval/bench_search.py --only hunyuan --output some.csv    the cases whose name matches

One attention call of each case, in bf16 on random inputs that are new in every run:
    dense           every dense kernel that is here, and ours with the lse that a search reads
    block_sums      the mass of every block: of all rows, and of 16 or 8 rows of each block (`sample`)
    keep_largest    the selection kernel, once; `select` is the whole selection: twice the kernel, the recall of heads
                    between, then row_ptr and order
    expand, sparse  what every sparse call does: lists from bits, and attention by them, at density .2
Everything in a case is timed in turn, round after round. A call is timed after its own output was checked: attention
and block sums against fp64 on some rows of two heads, at most twice the error of plain torch in the same precision;
selection and lists against torch, without a difference. Rows go to `assets/results/search_cost.csv`: medians and the
20th and 80th percentiles in ms.

Most of `select` is neither of its two kernels but some twenty small launches of torch, under 1 % of a dense forward.
For Wan also the rest of a layer, eager and compiled: Diffusers' own block with random weights, in which a processor
projects, norms and rotates as ours do, and then returns the values as they are (a copy, so that nothing is left out).

Rows of kernel `share` say what the two searches of a run of 50 steps take: 10 steps are dense, by the fastest dense
kernel, and the last of them searches (ours with lse, sums, selection); 40 are sparse, of which one refreshes (sums,
selection). Their extra time in percent of all attention, and of the whole run, attention and the rest of all layers: of
the run it may be 4 and should be 2.5.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from videosparse.benchmark.checks import picked_rows
from videosparse.benchmark.contenders import Call
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.benchmark.timing import interleave, quantiles
from videosparse.blocks import BlockIndex, PackedIndex
from videosparse.cases import CASES, Case
from videosparse.kernels import KernelOptions, attend, block_sums, selection, torch_select, triton_select
from videosparse.kernels.accuracy import allowed_error, measure, worst_row
from videosparse.kernels.dense import DENSE_KERNELS
from videosparse.kernels.selection import Selection
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.models import FAMILIES
from videosparse.policies.base import LayerPlan, Mode

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/search_cost.csv"
RUNS = (
    ("wan2.1-14b 720x1280x81", ((128, 64), (64, 64))),
    ("hunyuan-video 720x1280x129", ((128, 64),)),
)
DENSITY = 0.2
FFN, PROMPT = 13824, 512
"""Of Wan 14B: width of the feed-forward layer, tokens of the prompt."""
SAMPLES = (None, 16, 8)
DENSE_STEPS, SPARSE_STEPS = 10, 40
ROUNDS, SECONDS = 9, 14.0
COLUMNS = (
    "case", "tokens", "text", "batch", "heads", "head_dim", "dtype", "block", "kernel", "sample", "policy", "density",
    "error", "allowed", "p20_ms", "p50_ms", "p80_ms", "percent_of_dense", "share_of_attention",
    "share_of_run_eager", "share_of_run_compiled", "rounds", "note", *WHERE,
)  # fmt: skip
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
        tensors = [x[:, :, heads] for x in _tokens(p, layout)]
        block_map = None
        if sparse:
            whole = p.index.block_map()
            block_map = type(whole)(whole.keep[:, heads], whole.block, whole.q_len, whole.kv_len)
        rows = picked_rows(layout.length, out.device)
        judged = measure(out[:, :, heads], None, *tensors, layout=layout, block_map=block_map, rows=rows)
        return (judged.error if judged.empty_rows else float("nan")), judged.allowed

    return check


def _tokens(p: Problem, layout: TokenLayout) -> list[torch.Tensor]:
    """q, k and v as a layout of the same tokens has them."""
    if layout.length == p.layout.length:
        return [p.q, p.k, p.v]
    start = p.layout.text_start
    return [torch.cat([x[:, : p.layout.video], x[:, start:]], 1) for x in (p.q, p.k, p.v)]


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


def dense_calls(p: Problem) -> list[Timed]:
    """Every dense kernel that is here; libraries get no gap before text, as in a dense step."""
    plain = p.case.layout()
    q, k, v = _tokens(p, plain)
    scale = q.shape[3] ** -0.5
    check = check_attention(p, False, plain)
    found = [Timed(p.row("dense ours"), lambda: attend(q, k, v, layout=plain), check)]
    for name, kernel in DENSE_KERNELS.items():
        if name != "fa2" and kernel.unsuited(q) is None:
            found.append(
                Timed(p.row(f"dense {name}"), lambda kernel=kernel: kernel.attend(q, k, v, scale), check)  # type: ignore[misc]
            )
    with_lse = lambda: attend(p.q, p.k, p.v, layout=p.layout, return_lse=True)  # noqa: E731
    return [*found, Timed(p.row("dense ours with lse"), with_lse, check_attention(p, False))]


def search_calls(p: Problem) -> list[Timed]:
    """What a search does with one block size, and the sparse call after it."""
    found = []
    for sample in SAMPLES:
        call = lambda s=sample: block_sums(p.q, p.k, p.lse, layout=p.layout, block=p.block, sample=s)  # noqa: E731
        found.append(Timed(p.row("block_sums", sample), call, check_sums(p, sample)))
    density = selection_density(p)
    counts = torch.full(p.sums.shape[:2], p.selection.base, dtype=torch.int32, device=p.q.device)
    bits, chosen = torch.empty_like(p.index.bits), p.selection

    def keep() -> torch.Tensor:
        return triton_select.keep_largest(p.sums, counts, bits, chosen.video_rows, chosen.video_cols)

    def check_kept(_: Any) -> tuple[float, float]:
        expected = torch.empty_like(bits)
        torch_select.keep_largest(p.sums, counts, expected, chosen.video_rows, chosen.video_cols)
        return float((bits != expected).sum()), 0.0

    sparse = lambda: attend(p.q, p.k, p.v, layout=p.layout, index=p.lists)  # noqa: E731
    return [
        *found,
        Timed(p.row("keep_largest", density=density), keep, check_kept),
        Timed(p.row("select", density=density), lambda: selection.select(p.sums, p.index, chosen), check_selected(p)),
        Timed(p.row("expand", density=density), lambda: selection.expand(p.index), check_lists(p)),
        Timed(p.row("sparse", density=density), sparse, check_attention(p, True)),
    ]


@torch.library.custom_op("bench_search::values", mutates_args=())
def values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """v, in place of attention; opaque, so that a compiler cannot leave q and k out."""
    return v.clone()


@values.register_fake
def _values_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(v)


class ValuesOnly:
    """A processor of Wan's self-attention that does everything but attend."""

    def __init__(self, fused_norm: str = "auto") -> None:
        self.plan = LayerPlan(Mode.DENSE, TokenLayout(VideoGrid(1, 1, 1)), options=KernelOptions(fused_norm=fused_norm))

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """[B, L, C] from hidden states [B, L, C]."""
        family = FAMILIES["wan"]
        q, k, v = family.project(attn, hidden_states, None, rotary_emb, self.plan)
        return family.finish(attn, values(q, k, v), self.plan)


def rest_calls(p: Problem) -> list[Timed]:
    """A layer of Wan without its self-attention, eager and compiled."""
    if p.case.model.family != "wan":
        return []
    device, (_, length, heads, head_dim) = p.q.device, p.q.shape
    width = heads * head_dim
    with torch.device(device):
        block = WanTransformerBlock(width, FFN * width // 5120, heads, cross_attn_norm=True).requires_grad_(False)
        hidden, prompt, temb = torch.randn(1, length, width), torch.randn(1, PROMPT, width), torch.randn(1, 6, width)
        angles = (torch.rand(1, length, 1, head_dim // 2) * 6.3).repeat_interleave(2, 3)
    block, hidden, prompt = block.bfloat16(), hidden.bfloat16(), prompt.bfloat16()
    rotary = (angles.cos(), angles.sin())
    block.attn1.set_processor(ValuesOnly())

    def check(out: torch.Tensor) -> tuple[float, float]:
        """Without attention tokens are apart: some of them in fp32, and in bf16 by the steps of Diffusers."""
        few = torch.randint(0, length, (256,), device=device)
        turns = (rotary[0][:, few], rotary[1][:, few])
        steps, exact = copy.deepcopy(block), copy.deepcopy(block).float()
        for each in (steps, exact):
            each.attn1.set_processor(ValuesOnly("off"))
        truth = exact(hidden[:, few].float(), prompt.float(), temb, turns)
        return worst_row(out[:, few], truth), allowed_error(truth, steps(hidden[:, few], prompt, temb, turns))

    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    return [
        Timed(p.row(f"rest of a layer, {name}"), partial(layer, hidden, prompt, temb, rotary), check)
        for name, layer in (("eager", block), ("compiled", compiled))
    ]


def selection_density(p: Problem) -> float:
    """Kept / all blocks of the map."""
    samples, heads, rows, columns = p.index.shape
    return int(p.index.row_ptr[-1]) / (samples * heads * rows * columns)


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


def shares(p: Problem, dense: list[Timed], search: list[Timed], rest: list[Timed]) -> list[dict[str, Any]]:
    """Rows on what the two searches of a run take of its time, for each way to sum."""
    fastest = min((t for t in dense if t.times and "with lse" not in t.row["kernel"]), key=lambda t: t.median)
    with_lse = dense[-1].median
    by_name = {(t.row["kernel"], t.row["sample"]): t.median for t in search}
    select = by_name["select", ""]
    found = []
    for sample in SAMPLES:
        once = by_name["block_sums", sample or ""] + select
        extra = with_lse - fastest.median + 2 * once
        sparse = SPARSE_STEPS * (by_name["sparse", ""] + by_name["expand", ""])
        attention = DENSE_STEPS * fastest.median + extra + sparse
        row = p.row("share", sample, selection_density(p))
        row["share_of_attention"] = f"{100 * extra / attention:.2f}"
        for timed in rest:
            run = attention + (DENSE_STEPS + SPARSE_STEPS) * timed.median
            row[f"share_of_run_{timed.row['kernel'].split()[-1]}"] = f"{100 * extra / run:.2f}"
        note = f"{extra:.1f} of {attention:.1f} ms a layer, dense by {fastest.row['kernel'].removeprefix('dense ')}"
        found.append(row | {"note": note})
    return found


def run(name: str, blocks: tuple[tuple[int, int], ...], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case."""
    problems = make_problems(name, blocks, torch.device("cuda"))
    dense = dense_calls(problems[0])
    searches = [search_calls(p) for p in problems]
    rest = rest_calls(problems[0])
    everything = [*dense, *(t for search in searches for t in search), *rest]
    times = interleave({t: t.call for t in everything if is_right(t)}, rounds, seconds)
    for timed, found in times.items():
        timed.times = found
    for timed in times:
        p20, p50, p80 = quantiles(timed.times)
        timed.row |= {
            "p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}", "rounds": str(len(timed.times)),
            "percent_of_dense": f"{100 * p50 / dense[0].median:.2f}",
        }  # fmt: skip
    rows = [t.row for t in everything]
    for p, search in zip(problems, searches, strict=True):
        rows += shares(p, dense, search, rest)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    what = f"{row['case']:27} {row['block']:7} {row['kernel']:20} {row['sample'] or 'all':3}"
    if row["kernel"] == "share":
        of = {
            x.removeprefix("share_of_").replace("_", ", "): row[x]
            for x in COLUMNS
            if x.startswith("share") and x in row
        }
        return f"{what} {', '.join(f'{x} % of the {name}' for name, x in of.items())} ({row['note']})"
    timed = "{p50_ms:>9} ms ({p20_ms}..{p80_ms}) {percent_of_dense:>6} %".format(**row) if "p50_ms" in row else ""
    errors = f"error {row['error']} of {row['allowed']}" if "error" in row else ""
    return f"{what} {timed} {errors} {row.get('note', '')}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the rounds of one case")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    if args.only and args.output == OUTPUT:
        parser.error(f"--only would replace the rows of the other cases in {OUTPUT}; give another --output.")
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    failed = 0
    for name, blocks in RUNS:
        if re.search(args.only, name):
            try:
                with torch.no_grad():
                    found = run(name, blocks, args.rounds, args.seconds)
            except Exception:  # one case must not take the other along
                traceback.print_exc()
                failed = 1
                continue
            rows += found
            print("\n".join(map(line, found)), flush=True)
            torch.cuda.empty_cache()
    where = environment(args.commit)
    if rows:
        write_rows(args.output, [row | where for row in rows], COLUMNS)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
