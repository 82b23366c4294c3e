"""How settings are written, what they are called, and what runs for them."""

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import torch

from videosparse.cases import MODELS
from videosparse.evaluation.random_blocks import RandomPolicy
from videosparse.evaluation.settings import Conditions, Setting, expand, parse_setting
from videosparse.generation.errors import GenerationError
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies import AdaSpaPolicy, RadialPolicy
from videosparse.policies.base import RunStep

GRID = VideoGrid(9, 16, 16)
WAN = MODELS["wan2.1-1.3b"]


def conditions(plan=None):
    return Conditions(WAN, GRID, 0, (64, 64), 0.2, plan)


@pytest.mark.parametrize(
    ("text", "setting", "name"),
    [
        ("ceiling", Setting("ceiling"), "ceiling"),
        ("other-noise", Setting("other-noise"), "other noise"),
        ("dense+int8", Setting("dense", None, "int8"), "dense, int8"),
        ("adaspa@0.2", Setting("adaspa", 0.2), "adaspa 0.2"),
        ("paro-online@0.2", Setting("paro-online", 0.2), "paro-online 0.2"),
        ("paro-raster@0.5+int8", Setting("paro-raster", 0.5, "int8"), "paro 0.5, raster order, int8"),
        ("paro-mass@0.3", Setting("paro-mass", 0.3), "paro 0.3, orders by mass"),
        ("paro@radial+int8-fp8", Setting("paro", "radial", "int8-fp8"), "paro, density of radial, int8-fp8"),
        (
            "adaspa@0.1:head_adaptive=no:block=128x64",
            Setting("adaspa", 0.1, None, ("head_adaptive=no", "block=128x64")),
            "adaspa 0.1, head_adaptive=no, block=128x64",
        ),
    ],
)
def test_settings_are_read_and_named(text, setting, name):
    assert parse_setting(text) == setting
    assert setting.name == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("radail", "Did you mean 'radial'"),
        ("radial@0.3", "radial takes no density"),
        ("adaspa@1.5", "number in 0..1"),
        ("adaspa@", "method\\[@density\\]"),
        ("other-noise+int8", "of dense or a sparse method"),
        ("radial+int4", "int8, int8-fp8 or int8-int8"),
        ("random:block=64", "random has no options"),
        ("adaspa:depth=3", "no option 'depth'"),
    ],
)
def test_what_is_no_setting_is_told(text, told):
    with pytest.raises(GenerationError, match=told):
        parse_setting(text)


def test_methods_times_densities():
    names = [s.name for s in expand(["ceiling", "radial", "adaspa", "random@0.5", "adaspa@0.1"], ["radial", "0.1"])]
    assert names == [
        "dense", "ceiling", "radial", "adaspa, density of radial", "adaspa 0.1", "random 0.5",
    ]  # fmt: skip


def test_every_method_shares_schedule_and_block():
    found = conditions()
    for text in ("radial", "adaspa@0.3", "paro-online@0.3", "random@0.3"):
        resolved = found.processor(parse_setting(text)).resolve(WAN, grid=GRID)
        assert resolved.policy.block == (64, 64), text
        assert resolved.schedule.dense_steps(50) == (10, 0), text
        assert resolved.schedule.first_layers == 0, text
    assert found.processor(parse_setting("dense")).resolve(WAN).policy is None


def test_the_density_of_radial_is_that_of_its_map():
    found = conditions()
    expected = RadialPolicy(decay=0.2, block=(64, 64)).block_map(TokenLayout(GRID)).video_density(TokenLayout(GRID))
    policy = found.processor(parse_setting("adaspa@radial")).resolve(WAN, grid=GRID).policy
    assert isinstance(policy, AdaSpaPolicy)
    assert policy.density == pytest.approx(expected)


def test_options_and_integers_reach_the_kernels():
    found = conditions()
    options = found.processor(parse_setting("adaspa@0.2+int8:block=128x64")).resolve(WAN, grid=GRID)
    assert options.policy.block == (128, 64)
    assert options.options.quant == "int8"
    for text in ("random@0.2+int8", "radial+int8", "dense+int8"):
        assert found.processor(parse_setting(text)).resolve(WAN, grid=GRID).options.quant == "int8", text
    by_mass = found.processor(parse_setting("paro-online@0.2:order_by=mass")).resolve(WAN, grid=GRID).policy
    assert by_mass.order_by == "mass"
    assert found.processor(parse_setting("paro-online@0.2+int8-fp8")).resolve(WAN).options.quant == "int8-fp8"


def test_paro_asks_for_the_plan_of_its_density():
    asked = []

    def plan(density, orders):
        asked.append((density, orders))
        return Path("no-such-plan.safetensors")

    for text in ("paro@0.25", "paro-mass@0.25", "paro-raster@0.25"):
        with pytest.raises(GenerationError, match="no-such-plan"):
            conditions(plan).processor(parse_setting(text))
    assert asked == [(0.25, "metric"), (0.25, "mass"), (0.25, "raster")]


def test_random_maps_differ_by_layer_and_not_by_step():
    layout, cpu = TokenLayout(VideoGrid(4, 12, 15)), torch.device("cpu")
    policy = RandomPolicy(0.25)
    plans = [policy.plan(layout, RunStep("cond", i, 9), layer, {}, device=cpu) for i, layer in ((0, 0), (5, 0), (0, 1))]
    assert plans[0].index is plans[1].index
    assert not torch.equal(plans[0].index.ids, plans[2].index.ids)
    assert int(plans[0].index.row_ptr[-1]) == 12 * round(0.25 * 12)


def test_the_density_of_radial_is_that_of_its_experts():
    config, grid = {"_class_name": "WanTransformer3DModel", "in_channels": 16}, VideoGrid(21, 45, 80)
    one, two = (Conditions(config, grid, 0, (128, 64), 0.2, None, experts).radial_density for experts in (1, 2))
    assert one < 0.9 * two  # decay .2 and .8
