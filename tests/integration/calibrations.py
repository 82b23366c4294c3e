"""A plan calibrated on a tiny pipeline, as `videosparse calibrate` does it, for families that it does not load."""

from __future__ import annotations

from typing import Any

import torch

from videosparse.generation.calibrating import keep_blocks
from videosparse.generation.looking import Figures, MapSums, watching
from videosparse.kernels.order_search import OrderMetric
from videosparse.policies.paro_plan import PAROPlan, PlanFacts, plain_config

CPU = torch.device("cpu")


def calibrated(pipe: Any, arguments: dict[str, Any], *, density: float = 0.3, block=(64, 64), buckets=2) -> PAROPlan:
    """Two parts of the first half, and the second half, of a run of six steps."""
    with watching(pipe, CPU) as watch:
        heads = int(watch.tracker.config["num_attention_heads"])
        figures = Figures(watch.layers, heads, OrderMetric())
        pipe.set_progress_bar_config(disable=True)
        calls = watch.run({0: 0, 2: 1, 4: 2}, figures, {**arguments, "num_inference_steps": 6})
        codes = figures.codes
        grid, counts, bits = watch.layout.grid, [], []
        for bucket in range(buckets + 1):
            sums = MapSums(codes, grid, block)
            watch.replay([call for call in calls if call.bucket == bucket], sums)
            found = [keep_blocks(x, density, None, CPU) for x in sums.sums]
            counts.append(torch.stack([c for c, _, _ in found]))
            bits.append(torch.stack([b for _, b, _ in found]))
        config = watch.tracker.config
        facts = PlanFacts(
            model_class=str(config["_class_name"]), config=plain_config(config), text=watch.layout.text,
            grid=(grid.frames, grid.height, grid.width), layers=watch.layers, heads=heads, block=block,
            buckets=buckets, density=density, mass=None, video=(9, 0, 0),
        )  # fmt: skip
    return PAROPlan(codes, torch.stack(counts, 1), torch.stack(bits, 1), facts)
