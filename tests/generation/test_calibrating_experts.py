"""Plans of two experts that share a run: calibrated by the pipeline's own schedule, and what they refuse."""

import folders
import pytest
import torch

from videosparse import PAROProcessor, restore, sparsify
from videosparse.attach import tracker_of
from videosparse.evaluation.maps import drawn, maps_of
from videosparse.generation import GenerationError, GenerationRequest, generate
from videosparse.generation.calibrating import CalibrationRequest, calibrate
from videosparse.generation.looking import Watch
from videosparse.generation.planning import plan_run
from videosparse.generation.running import load_pipeline
from videosparse.generation.sources import find_spec
from videosparse.policies import PAROPolicy
from videosparse.policies.base import Mode
from videosparse.policies.paro_plan import PAROPlan, bucket_of, fingerprint

CPU = torch.device("cpu")
STEPS, FIRST = 10, 4  # at shift 3, four of ten levels are at .875 or above
SIZE = {"num_frames": 9, "height": 64, "width": 64, "steps": STEPS, "device": "cpu", "dtype": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.save_wan(tmp_path_factory.mktemp("models") / "experts", experts=2)


def request_of(folder, **fields):
    small = {"prompts": ("a red circle",), "model": str(folder), "buckets": 1, "density": 0.4, "block": (64, 64)}
    return CalibrationRequest(**{**SIZE, **small, **fields})


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(request_of(folder).resolve().runs[0])[0]


@pytest.fixture(scope="module")
def made(folder, pipe, tmp_path_factory):
    """(a calibration, the inputs' buckets by expert, as they were replayed)"""
    replayed, replay = [], Watch.replay

    def spy(self, calls, look):
        calls = list(calls)
        replayed.append([(call.expert, call.bucket) for call in calls])
        return replay(self, calls, look)

    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "replay", spy)
        return calibrate(request_of(folder), path, pipe=pipe), replayed


def test_each_expert_has_orders_and_maps_of_its_own(made, pipe):
    found, replayed = made
    plan = PAROPlan.load(found.path)
    facts = plan.facts
    assert (facts.experts, facts.layers, facts.heads, facts.attentions) == (2, 2, 2, 4)
    assert plan.codes.shape == (4, 2)
    assert plan.bits.shape[:3] == (4, 2, 2)
    assert len(facts.method["recall"]) == 2 * 2
    assert repr(plan).startswith("PAROPlan(plan.safetensors: 2 x WanTransformer3DModel, grid 3x8x8, density")
    assert facts.weights == tuple(fingerprint(t) for t in (pipe.transformer, pipe.transformer_2))
    assert len(set(facts.weights)) == 2
    # a map of each part of each expert's own steps, from both branches of guidance
    assert replayed == [[(expert, bucket)] * 2 for expert in (0, 1) for bucket in (0, 1)]
    assert facts.method["calls"] == 8


def test_an_expert_is_calibrated_as_it_would_be_alone(made, folder, pipe, tmp_path):
    """What the plan says of the first expert hangs on no call of the second."""
    plan = made[0].plan
    second = pipe.transformer_2
    with torch.no_grad():
        kept = [p.clone() for p in second.parameters()]
        for p in second.parameters():
            p.mul_(-1.5)
    try:
        other = calibrate(request_of(folder), tmp_path / "plan.safetensors", pipe=pipe).plan
    finally:
        with torch.no_grad():
            for p, before in zip(second.parameters(), kept, strict=True):
                p.copy_(before)
    assert torch.equal(other.bits[:2], plan.bits[:2])
    assert torch.equal(other.codes[:2], plan.codes[:2])
    assert not torch.equal(other.bits[2:], plan.bits[2:])


def test_every_step_reads_the_map_of_the_expert_at_work(made, folder, pipe, monkeypatch):
    log, plan_of = [], PAROPolicy.plan

    def spy(self, layout, run, layer, state, **given):
        found = plan_of(self, layout, run, layer, state, **given)
        log.append((run, layer, found))
        return found

    monkeypatch.setattr(PAROPolicy, "plan", spy)
    plan = made[0].plan
    options = {"paro": {"plan": str(made[0].path), "first_steps": 1}}
    size = {**SIZE, "model": str(folder)}
    first = generate(GenerationRequest("a square", method="paro", options=options, **size), pipe=pipe)
    assert {(run.index, run.expert) for run, *_ in log} == {(i, int(i >= FIRST)) for i in range(1, STEPS)}
    for run, layer, call in log:
        own, total = (run.index, FIRST) if run.index < FIRST else (run.index - FIRST, STEPS - FIRST)
        number = 2 * run.expert + layer
        assert call.mode is Mode.SPARSE
        assert list(call.order.codes) == plan.codes[number].tolist()
        expected = plan.index(call.layout, number, bucket_of(own, total, 1), CPU)
        assert torch.equal(call.index.bits, expected.bits)
    assert first.run.report.steps == STEPS


def test_planning_tells_the_densities_of_both(made, folder):
    found = plan_run(
        find_spec(str(folder)), method="paro", options={"plan": str(made[0].path)},
        **{k: v for k, v in SIZE.items() if k not in ("device", "dtype")},
    )  # fmt: skip
    assert found.video_density == pytest.approx(made[0].plan.density)


def test_maps_of_both_are_drawn(made, folder, pipe):
    from videosparse.evaluation.prompts import Prompt
    from videosparse.evaluation.running import Batches, settings_of

    sizes = {"frames": 9, "height": 64, "width": 64, "steps": STEPS, "device": "cpu", "dtype": "fp32"}
    batches = Batches(settings_of(str(folder), **sizes), pipe)
    picture = batches.make([Prompt("a square", 0)], PAROProcessor(made[0].path, first_steps=1), picture=True).picture
    assert picture.png.startswith(b"\x89PNG")
    assert "expert 1: layers 1, 2 of 2" in picture.caption
    assert "expert 2: layers 1, 2 of 2" in picture.caption
    assert drawn([]) is None
    sparsify(pipe, PAROProcessor())
    assert maps_of(pipe.transformer) is None
    restore(pipe)


def test_experts_that_changed_places_are_refused(made, pipe):
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    try:
        with pytest.raises(
            ValueError, match=r"knows this transformer as expert 2 of 2, and it sits in the place of exp"
        ):
            pipe.set_attn_processor(PAROProcessor(made[0].path))
    finally:
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    pipe.set_attn_processor(PAROProcessor(made[0].path))
    restore(pipe)


def test_a_fine_tune_of_an_expert_is_welcome(made, pipe):
    bias = pipe.transformer_2.blocks[0].attn1.to_q.bias
    with torch.no_grad():
        bias += 1
    try:
        pipe.set_attn_processor(PAROProcessor(made[0].path))
    finally:
        restore(pipe)
        with torch.no_grad():
            bias -= 1


def test_one_transformer_does_not_take_the_plan_of_two(made, pipe):
    with pytest.raises(ValueError, match=r"is for 2 experts that share a run, and this is one transformer, which does"):
        sparsify(pipe.transformer, PAROProcessor(made[0].path))
    sparsify(pipe.transformer_2, PAROProcessor(made[0].path), place=(1, 2))
    assert tracker_of(pipe.transformer_2).expert == 1
    restore(pipe)
    with pytest.raises(ValueError, match="knows this transformer as expert 2 of 2"):
        sparsify(pipe.transformer_2, PAROProcessor(made[0].path), place=(0, 2))


def test_another_configuration_of_one_expert_is_told(made):
    plan = made[0].plan
    config = {**plan.facts.others[0], "_class_name": "WanTransformer3DModel"}
    plan.check_model(config, 1)
    with pytest.raises(ValueError, match="with ffn_dim=32, this model has ffn_dim=64"):
        plan.check_model({**config, "ffn_dim": 64}, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buckets": 3}, "buckets must be 1 to 2, half of the 4 steps that expert 1 makes of 10, .* 3 need at least 6"),
        ({"steps": 2}, r"Calibration needs at least 2 steps that expert 1 makes of 2 \(got 1\); raise --steps"),
    ],
)
def test_an_expert_with_too_few_steps_is_told(folder, pipe, tmp_path, fields, message):
    with pytest.raises(GenerationError, match=message):
        calibrate(request_of(folder, **fields), tmp_path / "plan.safetensors", pipe=pipe)
    assert list(tmp_path.iterdir()) == []


def test_the_shift_decides_who_makes_which_steps(folder, pipe, tmp_path):
    scheduler = pipe.scheduler
    with pytest.raises(GenerationError, match="half of the 3 steps that expert 2 makes of 10"):
        calibrate(request_of(folder, shift=12.0, buckets=3), tmp_path / "plan.safetensors", pipe=pipe)
    plan = calibrate(request_of(folder, shift=12.0), tmp_path / "plan.safetensors", pipe=pipe).plan
    assert plan.facts.method["shift"] == 12.0
    assert pipe.scheduler is scheduler


def test_an_interrupted_calibration_goes_on_with_the_second_expert(made, folder, pipe, tmp_path, monkeypatch):
    path, replay, done = tmp_path / "plan.safetensors", Watch.replay, []

    def interrupted(self, *args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return replay(self, *args)

    monkeypatch.setattr(Watch, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(request_of(folder), path, pipe=pipe)
    monkeypatch.setattr(Watch, "replay", lambda self, *args: done.append(1) or replay(self, *args))
    assert calibrate(request_of(folder), path, pipe=pipe).resumed
    assert len(done) == 4, "nothing is done twice"
    assert path.read_bytes() == made[0].path.read_bytes()


def test_one_expert_alone_is_not_calibrated(folder, pipe, tmp_path):
    second, pipe.transformer_2 = pipe.transformer_2, None
    try:
        with pytest.raises(GenerationError, match="has 2 experts, and 1 of them are loaded; a plan holds all"):
            calibrate(request_of(folder), tmp_path / "plan.safetensors", pipe=pipe)
    finally:
        pipe.transformer_2 = second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_calibrating_and_generating_on_a_gpu(folder, tmp_path, offload):
    path, device = tmp_path / "plan.safetensors", {"device": "cuda", "dtype": "bf16", "offload": offload}
    request = request_of(folder, **device, mass=0.9, density=None)
    own, _ = load_pipeline(request.resolve().runs[0])
    plan = calibrate(request, path, pipe=own).plan
    assert plan.facts.experts == 2
    assert len(set(plan.facts.weights)) == 2
    options = {"paro": {"plan": str(path), "first_steps": 1}}
    size = {**SIZE, **device, "model": str(folder)}
    found = generate(GenerationRequest("a square", method="paro", options=options, **size), pipe=own).run.report
    assert found.sparse_calls == (STEPS - 1) * 2 * 2
    assert found.backend == "triton"
