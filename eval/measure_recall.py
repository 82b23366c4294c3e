"""Which blocks does a method keep, and what does dropping the others cost? On real queries, keys and values.

    python eval/measure_recall.py                                        81 and 321 frames; a minute on an H200
    python eval/measure_recall.py --frames 81 --prompts 1 --output r.csv    some minutes on a laptop

The embedded model generates a few prompts with dense attention. At some of the steps every layer's call is looked at
(the conditional branch): each method chooses its blocks, at each density, and is judged on this very call by the share
of attention mass that its blocks hold (recall) and by the relative L2 distance of its output from the dense one. AdaSpa
chooses as in a run: from the masses of its search step, and from its refresh on by the new queries and keys with the
lse of the search. One row of `assets/results/attention_recall.csv` per (frames, method, block, density, step), and one
over all steps after the search, with 95 % bootstrap intervals over calls.

    adaspa                  as published: head-adaptive, one refresh
    adaspa, equal heads     without head-adaptive densities
    adaspa, one search      without the refresh
    adaspa, sampled         its searches look at 16 rows of each query block
    adaspa, search now      searched in this very call: what the age of a map costs
    radial                  Radial Attention, at the densities that its decays reach
    best                    the blocks of greatest mass in this call, however many of a head or row: no recall is higher
    random                  equally many random blocks in every row
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.progress import Progress

from videosparse import DenseProcessor, sparsify
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.blocks import BlockMap
from videosparse.generation import embedded_model_path
from videosparse.kernels import attend, block_sums
from videosparse.layout import TokenLayout
from videosparse.metrics.attention import attention_recall, best_map, map_of, output_error, random_map
from videosparse.metrics.bootstrap import interval
from videosparse.models import family_of
from videosparse.policies import AdaSpaPolicy, RadialPolicy
from videosparse.policies.base import DenseSchedule, LayerPlan

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "assets/results/attention_recall.csv"
PROMPTS = ROOT / "eval/prompts/world64.json"
SEARCH, REFRESH = 0.2, 0.6  # of the run: the last of the dense first steps, and the second search
WATCHED = (0.2, 0.4, 0.58, 0.6, 0.8, 1.0)
DECAYS = (0.2, 2.0)
DENSITIES = (0.2, 0.1, 0.05)
BLOCKS = ((64, 64), (128, 64))
COLUMNS = (
    "frames", "tokens", "method", "block", "asked_density", "density", "step", "steps", "calls", "recall", "recall_low",
    "recall_high", "recall_worst_head", "error", "error_low", "error_high", *WHERE,
)  # fmt: skip

Key = tuple[str, tuple[int, int], float, int]


@dataclass(eq=False)
class Memory:
    """What AdaSpa has kept for one layer since its search: for each block size, and for sampled searches."""

    lse: torch.Tensor
    searched: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    refreshed: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """One call by one method: mean and worst head's recall, error, density, each of one sample."""

    recall: float
    worst: float
    error: float
    density: float


class Observer:
    """Judges every method on the calls of one run.

    Args:
        steps: of the run.
        densities: that are asked of every method; Radial takes part where a decay of `radial` reaches one.
        radial: its maps by density.
    """

    def __init__(self, steps: int, densities: list[float], radial: dict[float, BlockMap]) -> None:
        self.densities, self.radial = densities, radial
        self.search = DenseSchedule(first_steps=SEARCH).dense_steps(steps)[0] - 1
        self.refresh = AdaSpaPolicy(refresh=(REFRESH,)).refresh_steps(steps)[0] - 1
        if not 0 <= self.search < self.refresh:
            raise SystemExit(f"--steps must leave room for a search and a later refresh (got {steps}); use 50.")
        later = {max(self.search, round(share * steps) - 1) for share in WATCHED}
        self.watched = sorted(later | {self.search, self.refresh})
        self.memory: dict[int, Memory] = {}
        self.found: dict[Key, list[Judged]] = defaultdict(list)

    def see(
        self, layer: int, step: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
    ) -> None:
        """Judge one call on q, k, v [B, L, H, D]."""
        dense, lse = attend(q, k, v, layout=layout, return_lse=True)
        if step == self.search:
            self.memory[layer] = Memory(lse)
        for block in BLOCKS:
            masses = partial(block_sums, q, k, layout=layout, block=block)
            now = masses(lse)
            self._remember(layer, step, block, masses, now)
            for density in self.densities:
                for method, block_map in self._maps(layer, step, block, density, now, layout):
                    out = attend(q, k, v, layout=layout, index=block_map.index())
                    recall, error = attention_recall(now, block_map, layout), output_error(out, dense, layout)
                    kept = block_map.video_density(layout)
                    self.found[method, block, density, step] += [
                        Judged(float(r.mean()), float(r.min()), float(e.mean()), kept)
                        for r, e in zip(recall, error, strict=True)
                    ]

    def _remember(self, layer: int, step: int, block: tuple[int, int], masses: Any, now: torch.Tensor) -> None:
        memory = self.memory[layer]
        if step == self.search:
            memory.searched[block] = now
            memory.searched[block, "sampled"] = masses(memory.lse, sample=16)
        if step == self.refresh:
            memory.refreshed[block] = masses(memory.lse)
            memory.refreshed[block, "sampled"] = masses(memory.lse, sample=16)

    def _maps(
        self, layer: int, step: int, block: tuple[int, int], density: float, now: torch.Tensor, layout: TokenLayout
    ) -> Iterator[tuple[str, BlockMap]]:
        """Every method's choice."""
        memory = self.memory[layer]
        kept = memory.refreshed if step >= self.refresh else memory.searched
        adaptive, equal = (AdaSpaPolicy(density=density, block=block, head_adaptive=on) for on in (True, False))
        choices = {
            "adaspa": (adaptive, kept[block]),
            "adaspa, equal heads": (equal, kept[block]),
            "adaspa, one search": (adaptive, memory.searched[block]),
            "adaspa, sampled": (adaptive, kept[block, "sampled"]),
            "adaspa, search now": (adaptive, now),
        }
        for name, (policy, sums) in choices.items():
            yield name, map_of(policy.select(sums, layout))
        yield "best", best_map(now, density, layout, block)
        yield "random", random_map(now, density, layout, block, seed=1000 * layer + step)
        if block == (64, 64) and density in self.radial:
            yield "radial", self.radial[density]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 321])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=2, help="how many of the fixed prompts, in one batch")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="beside those of Radial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args()
    usual = all(getattr(args, name) == parser.get_default(name) for name in ("frames", "steps", "prompts", "densities"))
    if not usual and args.output == OUTPUT:
        parser.error(f"other settings would replace the rows of {OUTPUT}; give another --output.")
    return args


def radial_maps(layout: TokenLayout, device: torch.device) -> dict[float, BlockMap]:
    """Radial's maps by density, rounded to three digits."""
    maps = [RadialPolicy(decay=decay, block=(64, 64)).block_map(layout, device) for decay in DECAYS]
    return {round(m.video_density(layout), 3): m for m in maps}


def watch(pipe: DiffusionPipeline, frames: int, args: argparse.Namespace) -> tuple[Observer, TokenLayout]:
    """Generate, and judge the calls of the watched steps as they pass."""
    processor = DenseProcessor()
    sparsify(pipe, processor)
    seen: set[tuple[int, int]] = set()
    observer: Observer | None = None
    layout: TokenLayout | None = None

    def core(layer: int, original: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LayerPlan) -> Any:
        nonlocal observer, layout
        step = pipe.scheduler.step_index or 0
        if observer is None or layout is None:
            layout = plan.layout
            radial = radial_maps(layout, q.device)
            observer = Observer(args.steps, sorted({*radial, *args.densities}), radial)
        if step in observer.watched and (layer, step) not in seen:  # the first call of a step is the conditional one
            seen.add((layer, step))
            observer.see(layer, step, q, k, v, layout)
        return original(q, k, v, plan)

    for layer, attention in enumerate(family_of(pipe.transformer).attentions(pipe.transformer)):
        attention.module.processor.core = partial(core, layer, attention.module.processor.core)
    prompts = json.loads(PROMPTS.read_text())["prompts"][: args.prompts]
    pipe.set_progress_bar_config(disable=True)
    with Progress() as progress, torch.inference_mode():
        bar = progress.add_task(f"{frames} frames", total=args.steps)
        pipe(
            prompt=[p["prompt"] for p in prompts], num_frames=frames, height=128, width=128, guidance_scale=4.0,
            num_inference_steps=args.steps, max_sequence_length=48, output_type="latent",
            generator=[torch.Generator().manual_seed(p["seed"]) for p in prompts],
            callback_on_step_end=lambda *a: progress.advance(bar) or {},
        )  # fmt: skip
    assert observer is not None
    assert layout is not None
    return observer, layout


def row_of(calls: list[Judged]) -> dict[str, Any]:
    """Means of some calls, with their intervals."""
    row: dict[str, Any] = {"calls": len(calls), "density": f"{sum(c.density for c in calls) / len(calls):.4f}"}
    for name in ("recall", "error"):
        values = [getattr(c, name) for c in calls]
        _, low, high = interval(values)
        row |= {name: f"{sum(values) / len(values):.4f}", f"{name}_low": f"{low:.4f}", f"{name}_high": f"{high:.4f}"}
    return row | {"recall_worst_head": f"{min(c.worst for c in calls):.4f}"}


def rows_of(observer: Observer, layout: TokenLayout, frames: int, steps: int) -> Iterator[dict[str, Any]]:
    """One row per step, steps counted from 1, and one over all steps after the search."""
    groups: dict[tuple[Any, ...], list[Judged]] = defaultdict(list)
    for (method, block, density, step), calls in observer.found.items():
        groups[method, block, density, str(step + 1)] += calls
        if step > observer.search:
            groups[method, block, density, "all"] += calls
    for (method, block, density, step), calls in groups.items():
        yield {
            "frames": frames, "tokens": layout.video, "method": method, "block": "x".join(map(str, block)),
            "asked_density": density, "step": step, "steps": steps, **row_of(calls),
        }  # fmt: skip


def main() -> None:
    args = arguments()
    where = environment(args.commit)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    pipe = DiffusionPipeline.from_pretrained(embedded_model_path(), dtype=dtype).to(args.device)
    rows: list[dict[str, Any]] = []
    for frames in args.frames:
        observer, layout = watch(pipe, frames, args)
        rows += [row | where for row in rows_of(observer, layout, frames, args.steps)]
        write_rows(args.output, rows, COLUMNS)
        for row in rows:
            if row["step"] == "all" and row["frames"] == frames:
                print(*(row[c] for c in ("frames", "method", "block", "density", "recall", "error")), sep="  ")


if __name__ == "__main__":
    run_program(main)
