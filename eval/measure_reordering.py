"""What reading tokens in another order is worth to block maps: recall and output error on real queries, keys, values.

    python eval/measure_reordering.py                                        33 and 81 frames; a minute on an H200
    python eval/measure_reordering.py --frames 33 --prompts 1 --steps 10     some minutes on a laptop

The embedded model is calibrated densely with two prompts, as `videosparse calibrate` does it, and then generates others
densely, too. At the steps that calibration looks at, every layer's call (the conditional branch) is judged: for each
density and way of choosing a map, the share of the attention among video tokens that its blocks hold (recall), and the
relative L2 distance of the sparse output from the dense one. Every row of blocks keeps equally many. One row of
`assets/results/reordering.csv` per (frames, method, integers, density), over all calls, with 95 % bootstrap intervals.

    raster, static          no reordering; maps from calibration, one per part of the run
    reordered, static       the plan: the order that the paper's metric chooses in calibration, and maps in it
    by mass, static         the plan with `--order-by mass`: the order whose blocks of this density hold most in
                            calibration, and maps in it
    raster, this call       no reordering; the best blocks of this very call
    reordered, this call    the order that the metric chooses in this call, and the best blocks in it (online mode)
    best order, this call   the order in which the best blocks of this call hold most: what choosing can gain at most
    dense                   all blocks, in integers: what rounding alone does to real queries, keys and values

Static maps and dense attention also run in integers (`quant`), whose error is then on top of what the map leaves out;
`cosine_worst` is the least similar of all calls' outputs.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.blocks import BlockMap, unpack_rows
from videosparse.generation import GenerationRequest, Settings
from videosparse.generation.calibrating import BUCKETS, CalibrationRequest, CalibrationSettings, keep_blocks
from videosparse.generation.looking import Figures, MapSums, Shares, Watch, watching
from videosparse.generation.running import call_arguments, load_pipeline
from videosparse.kernels import KernelOptions, attend, reorder
from videosparse.kernels.order_search import Look, OrderMetric, choose, look
from videosparse.layout import TokenLayout
from videosparse.metrics.attention import attention_recall, output_error
from videosparse.metrics.bootstrap import interval
from videosparse.ordering import AXIS_ORDERS, SearchedOrder
from videosparse.policies.base import LayerPlan

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "assets/results/reordering.csv"
PROMPTS = ROOT / "eval/prompts/world64.json"
DENSITIES = (0.5, 0.3, 0.2, 0.1)
BLOCK = (64, 64)
QUANTS = (None, "int8", "int8-fp8", "int8-int8")
COLUMNS = (
    "frames", "tokens", "method", "quant", "block", "asked_density", "density", "steps", "calls", "recall",
    "recall_low", "recall_high", "recall_worst_head", "error", "error_low", "error_high", "cosine_worst",
    "reordered_heads", *WHERE,
)  # fmt: skip


@dataclass(eq=False)
class Static:
    """What calibration has found: orders, and the mass of blocks in these and in raster order, by part of the run.

    Orders by mass, and so the mass of blocks in them, are of one density each.
    """

    codes: torch.Tensor
    by_mass: dict[float, torch.Tensor]
    reordered: list[torch.Tensor] = field(default_factory=list)
    raster: list[torch.Tensor] = field(default_factory=list)
    most: dict[float, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Judged:
    """One call by one method.

    Args:
        recall, worst: mean and worst head's.
        error: relative L2 distance from the dense output, mean over heads.
        cosine: with the dense output as a whole.
        density: of the map.
        moved: share of heads not in raster order.
    """

    recall: float
    worst: float
    error: float
    cosine: float
    density: float
    moved: float


class Judge:
    """Judges every method on the calls that it is shown.

    Args:
        static: from calibration.
        densities: that are asked of every method.
    """

    def __init__(self, static: Static, densities: list[float]) -> None:
        self.static, self.densities, self.bucket = static, densities, 0
        self.found: dict[tuple[str, str | None, float], list[Judged]] = defaultdict(list)

    def see(self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Judge one call on q, k, v [B, L, H, D]; returns the dense output."""
        dense, lse = attend(q, k, v, layout=layout, return_lse=True)
        looks = [_joined(group) for group in zip(*look(q, k, lse, layout.grid, BLOCK), strict=True)]
        sums = torch.stack([one.sums.mean(0) for one in looks])  # [orders, H, M, N]
        sparse, uneven = (torch.stack([getattr(one, n).mean(0) for one in looks]) for n in ("sparse", "uneven"))
        chosen = choose(sparse, uneven, OrderMetric().alpha)
        for density in self.densities:
            for method, codes, mass in self._choices(number, sums, chosen, density):
                bits = keep_blocks(mass, density, None, q.device)[1].to(q.device)
                keep = unpack_rows(bits, sums.shape[3])[None]
                block_map = BlockMap(keep, BLOCK, layout.video, layout.video)
                recall = attention_recall(_of_codes(sums, codes)[None], block_map, layout)
                self._judge(method, density, (q, k, v), codes, block_map, recall, dense, layout)
        raster, every = torch.zeros_like(chosen), BlockMap.full(layout, BLOCK, q.device)
        self._judge("dense", 1.0, (q, k, v), raster, every, torch.ones(1), dense, layout)
        return dense

    def _judge(
        self,
        method: str,
        density: float,
        qkv: tuple[torch.Tensor, ...],
        codes: torch.Tensor,
        block_map: BlockMap,
        recall: torch.Tensor,
        dense: torch.Tensor,
        layout: TokenLayout,
    ) -> None:
        """Judge one map, in integers too where that is asked of the method."""
        order, index = SearchedOrder(layout.grid, codes.to(dense.device, torch.int32)), block_map.index()
        moved = [reorder(x, order, layout) for x in qkv]
        for quant in QUANTS if method == "dense" or method.endswith("static") else (None,):
            here = moved if quant is None else [x.bfloat16() if x.dtype == torch.float32 else x for x in moved]
            out = attend(*here, layout=layout, index=index, order=order, options=KernelOptions(quant=quant))
            error = output_error(out.to(dense.dtype), dense, layout).mean()
            cosine = torch.nn.functional.cosine_similarity(out.double().flatten(), dense.double().flatten(), 0)
            numbers = recall.mean(), recall.min(), error, cosine
            moves = float((codes != 0).float().mean())
            self.found[method, quant, density].append(Judged(*map(float, numbers), block_map.density, moves))

    def _choices(
        self, number: int, sums: torch.Tensor, chosen: torch.Tensor, density: float
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(method, codes [H], mass of blocks to choose by [H, M, N])."""
        raster = torch.zeros_like(chosen)
        own = self.static.codes[number].to(chosen)
        count = max(1, int(density * sums.shape[3] + 0.5))
        best = sums.topk(count, 3).values.sum((2, 3)).argmax(0)
        yield "raster, static", raster, self.static.raster[self.bucket][number]
        yield "reordered, static", own, self.static.reordered[self.bucket][number]
        by_mass = self.static.by_mass[density][number].to(chosen)
        yield "by mass, static", by_mass, self.static.most[density][self.bucket][number]
        for method, codes in (("raster", raster), ("reordered", chosen), ("best order", best)):
            yield f"{method}, this call", codes, _of_codes(sums, codes)


def _of_codes(sums: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Of sums [orders, H, M, N] each head's own."""
    return sums[codes.long(), torch.arange(len(codes), device=sums.device)]


def _joined(parts: tuple[Look, ...]) -> Look:
    """The groups of heads of one order as one."""
    names = ("sparse", "uneven", "sums")
    return replace(parts[0], **{n: torch.cat([getattr(part, n) for part in parts], 1) for n in names})


def calibrated(watch: Watch, settings: CalibrationSettings, densities: list[float]) -> Static:
    """Orders and block masses from dense runs."""
    heads = int(watch.tracker.config["num_attention_heads"])
    figures, calls = Figures(watch.layers, heads, settings.metric), []
    for run in settings.runs:
        calls += watch.run(settings.looked_at, figures, call_arguments(run))
    shares = {density: Shares(watch.layers, heads, BLOCK, density) for density in densities}
    for found in shares.values():
        watch.replay(calls, found)
        found.calls = figures.calls
    static = Static(figures.codes, {density: found.codes for density, found in shares.items()})
    for bucket in range(settings.request.buckets + 1):
        own = [call for call in calls if call.bucket == bucket]
        wanted = [(static.codes, static.reordered), (torch.zeros_like(static.codes), static.raster)]
        wanted += [(codes, static.most[density]) for density, codes in static.by_mass.items()]
        for codes, kept in wanted:
            sums = MapSums(codes, settings.runs[0].grid, BLOCK)
            watch.replay(own, sums)
            kept.append(sums.sums)
    return static


def judged(
    watch: Watch, judge: Judge, looked_at: dict[int, int], runs: list[Settings], advance: Any
) -> Iterator[Settings]:
    """Generate, and judge the conditional branch's calls of some steps; yields every run when it is done."""
    clock, seen = watch.tracker.session.clock, set[tuple[int, int, int]]()

    def core(number: int, original: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LayerPlan) -> Any:
        key = clock.run, clock.index, number
        if clock.index not in looked_at or key in seen:  # the first call of a step is the conditional one
            return original(q, k, v, plan)
        seen.add(key)
        judge.bucket = looked_at[clock.index]
        return judge.see(number, q, k, v, plan.layout)

    for number, (_, layer) in enumerate(watch.tracker.layers):
        original = layer.core
        vars(layer)["core"] = lambda *call, n=number, o=original: core(n, o, *call)
    for run in runs:
        watch.pipe(**{**call_arguments(run), "output_type": "latent"}, callback_on_step_end=advance)
        yield run


def _advance(progress: Progress, bar: TaskID, *step: Any) -> dict[str, Any]:
    progress.advance(bar)
    return {}


def rows_of(judge: Judge, layout_tokens: int, frames: int, steps: int) -> Iterator[dict[str, Any]]:
    """One row per method, integers and density."""
    for (method, quant, density), calls in judge.found.items():
        row: dict[str, Any] = {
            "frames": frames, "tokens": layout_tokens, "method": method, "quant": quant or "",
            "block": "x".join(map(str, BLOCK)),
            "asked_density": density, "density": f"{sum(c.density for c in calls) / len(calls):.4f}", "steps": steps,
            "calls": len(calls), "recall_worst_head": f"{min(c.worst for c in calls):.4f}",
            "cosine_worst": f"{min(c.cosine for c in calls):.5f}",
            "reordered_heads": f"{sum(c.moved for c in calls) / len(calls):.4f}",
        }  # fmt: skip
        for name in ("recall", "error"):
            values = [getattr(c, name) for c in calls]
            _, low, high = interval(values)
            row |= {
                name: f"{sum(values) / len(values):.4f}",
                f"{name}_low": f"{low:.4f}",
                f"{name}_high": f"{high:.4f}",
            }
        yield row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[33, 81])
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=4, help="how many of the fixed prompts; the last two calibrate")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    where = environment(args.commit)
    prompts = json.loads(PROMPTS.read_text())["prompts"]
    rows: list[dict[str, Any]] = []
    pipe = None
    for frames in args.frames:
        size = {
            "num_frames": frames,
            "height": args.size,
            "width": args.size,
            "steps": args.steps,
            "device": args.device,
        }
        chosen = prompts[: args.prompts]
        runs = [GenerationRequest(p["prompt"], method="dense", seed=p["seed"], **size).resolve() for p in chosen]
        settings = CalibrationRequest(
            [p["prompt"] for p in prompts[-2:]], buckets=min(BUCKETS, args.steps // 2), block=BLOCK, **size
        ).resolve()
        if pipe is None:
            pipe, _ = load_pipeline(runs[0])
        with watching(pipe, runs[0].device) as watch, Progress() as progress, torch.inference_mode():
            bar = progress.add_task(f"{frames} frames", total=args.steps * len(runs))
            judge = Judge(calibrated(watch, settings, list(args.densities)), list(args.densities))
            orders = torch.bincount(judge.static.codes.flatten().long(), minlength=6).tolist()
            done = list(rows)
            for run in judged(watch, judge, settings.looked_at, runs, partial(_advance, progress, bar)):
                # after every run, so that a program that is cut off keeps what it has
                rows = done + [row | where for row in rows_of(judge, run.grid.tokens, frames, args.steps)]
                write_rows(args.output, rows, COLUMNS)
        print(f"{frames} frames, orders of the plan:", dict(zip(AXIS_ORDERS, orders, strict=True)))
        for row in rows:
            if row["frames"] == frames:
                print(
                    *(row[c] for c in ("asked_density", "method", "quant", "recall", "error", "cosine_worst")), sep="  "
                )


if __name__ == "__main__":
    run_program(main)
