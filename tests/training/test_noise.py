"""Noise levels: their distribution, ranges, the dense rule, and each family's conventions against its own scheduler."""

import math

import pytest
import torch

from videosparse.training.families import TRAINING_FAMILIES
from videosparse.training.noise import NoiseLevels, RunSchedule, shifted


@pytest.mark.parametrize("draw", ["logit-normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_quantiles_are_those_of_the_samples(draw, shift):
    g = torch.Generator().manual_seed(0)
    t = torch.sigmoid(torch.randn(200_000, generator=g)) if draw == "logit-normal" else torch.rand(200_000, generator=g)
    samples = shifted(t, shift)
    levels = NoiseLevels(draw, shift)
    for q in (0.05, 0.25, 0.5, 0.9):
        assert abs(levels.level(q) - float(samples.quantile(q))) < 0.005
        assert levels.quantile(levels.level(q)) == pytest.approx(q, abs=1e-9)


def test_a_range_of_levels_is_kept_and_keeps_its_proportions():
    levels = NoiseLevels("logit-normal", 3.0, 0.875, 1.0)
    drawn = [levels.level((i + 0.5) / 1000) for i in range(1000)]
    assert 0.875 <= min(drawn) < 0.877
    assert max(drawn) < 1
    whole = NoiseLevels("logit-normal", 3.0)
    share = (1 - whole.quantile(0.95)) / (1 - whole.quantile(0.875))
    assert sum(level > 0.95 for level in drawn) / 1000 == pytest.approx(share, abs=0.002)
    assert levels.share_above(0.95) == pytest.approx(share)
    assert NoiseLevels("logit-normal", 3.0, 0.0, 0.875).share_above(0.9) == 0


def levels_of_a_run(kind, shift, steps):
    """The noise levels that a family's pipeline passes through, by its own scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    if kind == "wan":
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
        scheduler.set_timesteps(steps)
        return [float(s) for s in scheduler.sigmas[:steps]]
    if kind == "hunyuan_video":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        return [float(s) for s in scheduler.sigmas[:steps]]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=True)
    scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps, 0.025))
    return [1 - float(s) for s in scheduler.sigmas[:steps]]


@pytest.mark.parametrize(
    ("kind", "shift"),
    [("wan", 3.0), ("wan", 5.0), ("wan", 12.0), ("hunyuan_video", 7.0), ("mochi", 1.0), ("mochi", 2.0)],
)
@pytest.mark.parametrize("dense", [2, 5, 12, 38])
def test_the_dense_rule_is_the_schedule_of_a_run(kind, shift, dense):
    """Noise that training sees densely is that of the dense steps of a run, by the shift of the run."""
    from videosparse.policies.base import DenseSchedule, RunStep

    fraction = dense / 50
    levels = levels_of_a_run(kind, shift, 50)
    schedule = RunSchedule(shift, TRAINING_FAMILIES[kind].halves)
    by_step = [DenseSchedule(first_steps=fraction).is_dense(RunStep("c", i, 50), 5, 8) for i in range(50)]
    assert by_step == [True] * dense + [False] * (50 - dense)
    # the threshold is the level of the first sparse step; those of UniPC lie up to .002 above even ones
    above = schedule.dense_above(fraction)
    assert levels[dense] == pytest.approx(above, abs=2e-3)
    assert min(range(50), key=lambda i: abs(levels[i] - above)) == dense


def test_nothing_is_dense_without_dense_steps():
    assert RunSchedule(3.0).dense_above(0.0) == 1.0
    for schedule in (RunSchedule(3.0), RunSchedule(1.0, halves=True)):
        assert (schedule.level(0.0), schedule.level(1.0)) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "mochi"])
def test_the_target_is_what_the_scheduler_integrates(name):
    """A model that predicts the target exactly is taken to the next noise level by the pipeline's scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    family = TRAINING_FAMILIES[name]
    kinds = {"mochi": {"invert_sigmas": True}, "hunyuan_video": {"shift": 7.0}, "wan": {"shift": 3.0}}
    scheduler = FlowMatchEulerDiscreteScheduler(**kinds[name])
    sigmas = [1.0, 0.8, 0.5, 0.2]
    scheduler.set_timesteps(sigmas=sigmas)
    x0, eps = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    level = [1 - float(s) if family.rising else float(s) for s in scheduler.sigmas]
    for i in (1, 2):
        now, later = ((1 - s) * x0 + s * eps for s in level[i : i + 2])
        time = family.timestep(torch.tensor([level[i]]))
        assert float(time) == pytest.approx(float(scheduler.timesteps[i]), rel=1e-4)
        moved = scheduler.step(family.target_of(x0, eps), scheduler.timesteps[i], now).prev_sample
        torch.testing.assert_close(moved, later, rtol=0, atol=1e-5)
        scheduler._step_index = None


def test_levels_never_leave_the_open_interval():
    for levels in (NoiseLevels("logit-normal", 3.0), NoiseLevels("uniform", 1.0)):
        assert all(0 < levels.level(q) < 1 and math.isfinite(levels.level(q)) for q in (0.0, 1.0))
