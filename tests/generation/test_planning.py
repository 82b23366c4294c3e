"""Numbers of a run, without weights."""

import pytest

from videosparse.generation import GenerationError
from videosparse.generation.planning import plan_run
from videosparse.generation.sources import find_spec


def test_wan_14b_at_720p():
    plan = plan_run(find_spec("wan2.1-14b"), num_frames=161, height=720, width=1280, steps=50)
    assert (str(plan.grid), plan.grid.tokens, plan.branches) == ("41x45x80", 147_600, 2)
    assert plan.dense_flops == 4 * 147_600**2 * 128 * 40 * 40 * 2
    assert plan.density == plan.video_density == plan.block_map.density < 0.3
    expected = (12 + 38 * (1 + 39 * plan.density) / 40) / 50
    assert plan.average_density == pytest.approx(expected)
    assert plan.run_flops == pytest.approx(12 * plan.dense_flops + 38 * plan.sparse_flops)
    assert plan.attention_bound == pytest.approx(1 / expected)
    assert plan.map_bytes == 1154**2
    assert plan.index_bytes > 4 * plan.density * plan.map_bytes
    assert plan.method["decay"] == 0.2


def test_text_counts():
    plan = plan_run(find_spec("hunyuan-video"), num_frames=33, height=320, width=320)
    assert plan.layout.text == 256
    assert plan.density != plan.video_density
    assert plan.branches == 1


def test_dense():
    plan = plan_run(find_spec("mochi"), method="dense")
    assert (plan.density, plan.attention_bound, plan.block_map) == (1.0, 1.0, None)
    with pytest.raises(GenerationError, match="no block map to draw"):
        plan.save_png("unused.png")


def test_no_guidance_is_one_branch():
    assert plan_run(find_spec("wan2.1-1.3b"), guidance=1.0).branches == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"steps": 0}, "steps must be"), ({"num_frames": 80}, "use 77 or 81"), ({"method": "x"}, "Unknown method")],
)
def test_errors(fields, message):
    with pytest.raises(GenerationError, match=message):
        plan_run(find_spec("wan2.1-1.3b"), **fields)
