"""Numbers of a run, without weights."""

from dataclasses import dataclass

import pytest
import torch

from videosparse.blocks import BlockMap
from videosparse.generation import GenerationError, GenerationRequest, methods
from videosparse.generation.planning import plan_request, plan_run
from videosparse.generation.sources import find_spec
from videosparse.kernels import KernelOptions
from videosparse.policies.base import DenseSchedule, SparsityPolicy
from videosparse.processors import Processor, Resolved


def test_wan_14b_at_720p():
    plan = plan_run(find_spec("wan2.1-14b"), num_frames=161, height=720, width=1280, steps=50)
    assert (str(plan.grid), plan.grid.tokens, plan.branches) == ("41x45x80", 147_600, 2)
    assert plan.dense_flops == 4 * 147_600**2 * 128 * 40 * 40 * 2
    assert plan.density == plan.video_density == plan.block_map.density < 0.3
    expected = (12 + 38 * (1 + 39 * plan.density) / 40) / 50
    assert plan.average_density == pytest.approx(expected)
    assert plan.run_flops == pytest.approx(12 * plan.dense_flops + 38 * plan.sparse_flops)
    assert plan.attention_bound == pytest.approx(1 / expected)
    assert plan.map_bytes == 1154 * 2307
    ids = 2 * plan.density * plan.map_bytes  # and the ends of rows
    assert ids < plan.index_bytes < 1.1 * ids
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


def test_a_new_static_method_is_planned_and_one_that_searches_is_refused(monkeypatch):
    @dataclass(frozen=True)
    class Banded(SparsityPolicy):
        searches: bool = False

        name = "banded"
        pure = True
        block = (64, 64)

        def plan(self, *_, **__):
            raise NotImplementedError

        def static_map(self, layout, device="cpu"):
            return None if self.searches else BlockMap.full(layout, self.block, device)

    @dataclass(frozen=True, eq=False, repr=False)
    class BandedProcessor(Processor):
        searches: bool = False

        def resolve(self, model, *, experts=1, grid=None):
            return Resolved("wan2.1", Banded(self.searches), DenseSchedule(), KernelOptions())

    monkeypatch.setitem(methods.METHODS, "banded", BandedProcessor)
    source = find_spec("tiny-wan")
    plan = plan_run(source, method="banded")
    assert (plan.density, plan.block_map.block, plan.method["searches"]) == (1.0, (64, 64), False)
    with pytest.raises(GenerationError, match=r"banded chooses blocks while it runs.*generate --compare"):
        plan_run(source, method="banded", options={"searches": True})
    methods.check_method_fits(source, plan.grid, "banded", {"searches": True}, torch.device("cpu"))


def test_adaspa_on_wan_14b():
    """50 steps: ten dense, the last of which searches, and a refresh; each pass is half a dense forward."""
    size = {"num_frames": 81, "height": 720, "width": 1280, "steps": 50}
    plan = plan_run(find_spec("wan2.1-14b"), **size, method="adaspa", options={"sample": None})
    assert (plan.blocks, plan.block, plan.block_map) == ((591, 1182), (128, 64), None)
    assert plan.density == plan.video_density == pytest.approx(0.2, abs=5e-4)
    assert plan.average_density == pytest.approx((10 + 40 * plan.density) / 50)
    assert plan.search == pytest.approx(2 * 0.5 / 50)
    assert plan.search_flops == pytest.approx(0.02 * plan.dense_run_flops)
    assert plan.run_flops == pytest.approx((plan.average_density + 0.02) * plan.dense_run_flops)
    assert plan.attention_bound == pytest.approx(plan.dense_run_flops / plan.run_flops)
    sampled = plan_run(find_spec("wan2.1-14b"), **size, method="adaspa")
    assert sampled.search == pytest.approx(plan.search * 16 / 128)
    assert plan.state_bytes["lse"] == 75_600 * 40 * 4
    assert plan.state_bytes["bits"] == 40 * 591 * 148
    assert plan.kept_bytes == 2 * 40 * sum(plan.state_bytes.values())
    assert plan.sums_bytes == 40 * 591 * 1182 * 4
    assert plan.method["refresh"] == (0.6,)
    with pytest.raises(GenerationError, match="chooses blocks while it runs: there is no block map to draw before"):
        plan.save_png("unused.png")


def test_adaspa_with_text_dense_layers_and_experts():
    spec = find_spec("hunyuan-video")
    plan = plan_run(spec, method="adaspa", options={"first_layers": 2, "lse_dtype": "bfloat16", "sample": 16})
    assert plan.density > plan.video_density
    assert plan.search == pytest.approx(58 / 60 * 2 * 0.5 * 16 / 128 / plan.steps)
    assert plan.kept_bytes == 58 * sum(plan.state_bytes.values())
    assert plan.state_bytes["lse"] == 24 * 2 * plan.layout.aligned((128, 64)).length
    experts = plan_run(find_spec("wan2.2-a14b"), steps=40, method="adaspa")
    # the second expert's first step is dense, too
    assert experts.average_density == pytest.approx((9 + 31 * experts.density) / 40)
    assert experts.search == pytest.approx(3 * 0.5 * 16 / 128 / 40)
    assert experts.searching_steps == 1
    exact = plan_run(find_spec("wan2.2-a14b"), steps=40, method="adaspa", options={"sample": None})
    assert exact.search == pytest.approx(3 * 0.5 / 40)
    one = plan_run(find_spec("wan2.1-14b"), steps=1, method="adaspa")
    assert (one.average_density, one.search, one.searching_steps) == (1.0, 0.0, 1)
    with pytest.raises(GenerationError, match="refresh=3 is step 3 of 50"):
        plan_run(spec, method="adaspa", options={"refresh": 3}, steps=50)


def test_no_guidance_is_one_branch():
    assert plan_run(find_spec("wan2.1-1.3b"), guidance=1.0).branches == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, r"steps must be 1 to 1000 \(got 0\); the model's is 50"),
        ({"guidance": -1.0}, "guidance must be 0 to 100"),
        ({"num_frames": 80}, "use 77 or 81"),
        ({"method": "x"}, "Unknown method"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(GenerationError, match=message):
        plan_run(find_spec("wan2.1-1.3b"), **fields)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"shift": -5.0}, "shift must be"),
        ({"step_cache": "nonsense"}, "Unknown step cache"),
        ({"model": "mochi", "rope": "riflex"}, "Mochi learned the frequencies"),
        ({"model": "mochi", "steps": 1}, "steps must be"),
        ({"rope": "ntk", "trained_frames": 82}, r"4k\+1"),
    ],
)
def test_what_could_not_be_generated_has_no_plan(asked, told):
    with pytest.raises(GenerationError, match=told):
        plan_request(GenerationRequest("a cat", **{"model": "wan2.1-14b", **asked}))
