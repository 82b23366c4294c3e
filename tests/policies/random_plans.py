"""Plans of PAROAttention with random contents, for tests."""

import torch

from videosparse.blocks import pack_rows
from videosparse.layout import VideoGrid, ceil_div
from videosparse.policies.paro_plan import PAROPlan, PlanFacts

CONFIG = {"num_attention_heads": 3, "num_layers": 2, "patch_size": [1, 2, 2]}
GRID = VideoGrid(3, 9, 10)


def make_plan(grid=GRID, layers=2, heads=3, block=(128, 64), buckets=2, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (ceil_div(grid.tokens, b) for b in block)
    counts = torch.randint(1, columns + 1, (layers, buckets + 1, heads), generator=generator, dtype=torch.int32)
    rank = torch.rand(layers, buckets + 1, heads, rows, columns, generator=generator).argsort(-1).argsort(-1)
    codes = torch.randint(0, 6, (layers, heads), generator=generator, dtype=torch.uint8)
    facts = PlanFacts(
        model_class="WanTransformer3DModel", config=CONFIG, grid=(grid.frames, grid.height, grid.width), text=0,
        layers=layers, heads=heads, block=block, buckets=buckets, density=0.5, mass=None, video=(9, 144, 160), **more,
    )  # fmt: skip
    return PAROPlan(codes, counts, pack_rows(rank < counts[..., None, None]), facts)
