"""How dense Radial Attention's maps are on real models, against the published figures.

    python eval/measure_densities.py

Needs no weights and no GPU. Writes `assets/results/radial_density.csv`: for each model and size, with the method's
defaults for that model, the density of video blocks, the density with text, the average over a 50-step run with its
dense steps and layers, the bound that this puts on the speed-up of attention, the density under the authors' block
rule, and the time to build the map.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from videosparse.benchmark.rows import write_rows
from videosparse.cases import CASES, Case
from videosparse.policies import RadialPolicy
from videosparse.processors import RadialProcessor

OUTPUT = Path(__file__).parents[1] / "assets/results/radial_density.csv"
STEPS = 50


def row_of(case: Case) -> dict[str, object]:
    experts = 2 if case.model.name == "wan2.2-a14b" else 1
    resolved = RadialProcessor().resolve(case.model, experts=experts, grid=case.grid)
    policy, schedule = resolved.policy, resolved.schedule
    assert isinstance(policy, RadialPolicy)
    layout = case.layout()
    start = time.perf_counter()
    block_map = policy.block_map(layout)
    seconds = time.perf_counter() - start
    density = block_map.density
    average = schedule.average_density(density, STEPS, case.model.layers)
    return {
        "model": case.model.name, "pixels": f"{case.height}x{case.width}x{case.num_frames}", "grid": str(case.grid),
        "tokens": layout.length, "block": "x".join(map(str, policy.block)), "decay": policy.decay,
        "coverage": policy.coverage, "video_density": round(block_map.video_density(layout), 4),
        "density": round(density, 4), "average_density": round(average, 4), "steps": STEPS,
        "attention_bound": round(1 / average, 2), "map_build_s": round(seconds, 3),
        "majority_density": round(replace(policy, coverage="majority").block_map(layout).density, 4),
        "index_mb": round(policy.block_index(layout).bytes / 1e6, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows = [row_of(case) for case in CASES.values()]
    write_rows(args.output, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    run_program(main)
