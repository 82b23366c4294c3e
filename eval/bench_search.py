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

from videosparse.program import run_program

import argparse
import copy
import re
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.benchmark.searches import (
    Problem,
    Timed,
    check_attention,
    check_lists,
    check_selected,
    check_sums,
    is_right,
    make_problems,
)
from videosparse.benchmark.timing import interleave, quantiles
from videosparse.kernels import KernelOptions, attend, block_sums, selection, torch_select, triton_select
from videosparse.kernels.accuracy import allowed_error, worst_row
from videosparse.kernels.dense import DENSE_KERNELS
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models import FAMILIES
from videosparse.policies.base import LayerPlan, Mode

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/search_cost.csv"
RUNS = (
    ("wan2.1-14b 720x1280x81", ((128, 64), (64, 64))),
    ("hunyuan-video 720x1280x129", ((128, 64),)),
)
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


def dense_calls(p: Problem) -> list[Timed]:
    """Every dense kernel that is here; libraries get no gap before text, as in a dense step."""
    plain = p.case.layout()
    q, k, v = p.tokens(plain)
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
    density = p.density
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
        row = p.row("share", sample, p.density)
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
    run_program(main)
