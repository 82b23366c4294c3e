"""Whole pipelines, every class that is supported: parity, restoring, determinism, and the clock of their runs."""

import copy
import gc
import weakref
from pipes import PIPES, TINY, _shared
from types import MethodType

import pytest
import torch
from probes import FullMap, Probe

from videosparse import DenseProcessor, RadialProcessor, restore, sparsify
from videosparse.attach import tracker_of
from videosparse.clock import Clock
from videosparse.policies.base import DenseSchedule
from videosparse.processors import LayerProcessor

EVERY = pytest.mark.parametrize("name", PIPES)
ONE_OF_A_FAMILY = pytest.mark.parametrize("name", ["wan", "hunyuan_true_cfg", "mochi"])
WIDE = {"height": 256, "width": 384, "num_frames": 17}
MAIN_CALLS = {"wan": 17, "hunyuan_true_cfg": 17, "mochi": 19}


def wide(name):
    return {**WIDE, "num_frames": MAIN_CALLS[name]}


def layers_of(pipe):
    parts = [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]
    return [
        m.processor
        for part in parts
        for m in part.modules()
        if isinstance(getattr(m, "processor", None), LayerProcessor)
    ]


@EVERY
def test_dense_equals_stock_and_restore_is_exact(name, pipe_of):
    pipe, kind = pipe_of(name), PIPES[name]
    before = {id(m): m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")}
    stock = kind.run(pipe)
    processor = DenseProcessor()
    pipe.set_attn_processor(processor)
    dense = kind.run(pipe)
    torch.testing.assert_close(dense, stock, rtol=0, atol=1e-5)
    report = processor.report()
    steps = 3 if name == "wan_v2v" else kind.steps  # strength .75 of 4
    assert (report.steps, report.dense_calls) == (steps, steps * kind.calls * kind.layers)
    assert (report.sparse_calls, report.average_density) == (0, 1.0)
    restore(pipe)
    restore(pipe)
    assert {id(m): m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")} == before
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(kind.run(pipe), stock)


@EVERY
def test_the_clock(name, pipe_of):
    """(branch, step, steps of the run) of every forward: V2V, image-to-video and two experts included."""
    pipe, kind = pipe_of(name), PIPES[name]
    probe = Probe()
    sparsify(pipe, probe)
    steps = 3 if name == "wan_v2v" else kind.steps
    contexts = {
        "mochi": ["cond_uncond"], "hunyuan": ["cond"], "wan_v2v": ["0", "1"], "hunyuan_i2v": ["0", "1"],
    }.get(name, ["cond", "uncond"])  # fmt: skip
    expected = [(context, index, steps) for index in range(steps) for context in contexts]
    for _ in range(2):
        probe.policy.log.clear()
        kind.run(pipe)
        assert probe.steps() == expected
        assert probe.report().steps == steps


@EVERY
def test_state_belongs_to_a_branch_of_one_run(name, pipe_of):
    pipe, kind = pipe_of(name), PIPES[name]
    probe = Probe(FullMap(pure=False))
    sparsify(pipe, probe)
    for _ in range(2):
        probe.policy.log.clear()
        kind.run(pipe)
        if getattr(pipe, "transformer_2", None) is None:
            assert all(calls == run.index + 1 for run, _, calls in probe.policy.log)
        else:
            # each expert starts from nothing: both together have seen every step once
            steps = kind.steps
            calls = [calls for run, layer, calls in probe.policy.log if layer == 0 and run.context == "cond"]
            assert sorted(calls)[:2] == [1, 1]
            assert len(calls) == steps
        trackers = [vars(t)["_videosparse_tracker"] for t in (pipe.transformer,)]
        assert all(not tracker.states for tracker in trackers), "state must be freed at the end of a run"


@ONE_OF_A_FAMILY
def test_sparse_generation(name, pipe_of):
    """Twice in a row bitwise the same, unlike dense; the schedule decides what is dense."""
    pipe, kind = pipe_of(name), PIPES[name]
    stock = kind.run(pipe, **wide(name), num_inference_steps=3)
    processor = RadialProcessor(decay=0.2, sink=False, first_steps=1, first_layers=1)
    pipe.set_attn_processor(processor)
    first = kind.run(pipe, **wide(name), num_inference_steps=3)
    report = processor.report()
    assert report.density < 0.9
    assert report.sparse_calls == 2 * kind.calls
    assert report.dense_calls == 3 * kind.calls * 2 - report.sparse_calls
    calls = report.dense_calls + report.sparse_calls
    assert report.average_density == pytest.approx((report.dense_calls + report.sparse_calls * report.density) / calls)
    assert not torch.equal(first, stock)
    assert torch.equal(kind.run(pipe, **wide(name), num_inference_steps=3), first)
    restore(pipe)
    assert torch.equal(kind.run(pipe, **wide(name), num_inference_steps=3), stock)


def test_average_density_is_what_the_schedule_promises(pipe_of):
    pipe = pipe_of("wan")
    processor = RadialProcessor(decay=0.2, sink=False, first_steps=0.3, last_steps=1, first_layers=1)
    pipe.set_attn_processor(processor)
    PIPES["wan"].run(pipe, height=128, width=128, num_inference_steps=6)
    report = processor.report()
    promised = processor.binding.resolved.schedule.average_density(report.density, 6, 2)
    assert report.average_density == pytest.approx(promised)


def test_another_resolution_gets_another_map(pipe_of):
    pipe, kind = pipe_of("wan"), PIPES["wan"]
    settings = {"decay": 0.2, "sink": False, "first_steps": 0, "first_layers": 0}
    processor = RadialProcessor(**settings)
    pipe.set_attn_processor(processor)
    kind.run(pipe, height=128, width=192)
    assert str(processor.report().grid) == "3x8x12"
    other = kind.run(pipe, height=192, width=128)
    assert str(processor.report().grid) == "3x12x8"
    pipe.set_attn_processor(RadialProcessor(**settings))
    assert torch.equal(kind.run(pipe, height=192, width=128), other)


def test_another_resolution_is_one_new_run_for_both_experts(pipe_of):
    pipe, kind = pipe_of("wan22"), PIPES["wan22"]
    probe = Probe()
    sparsify(pipe, probe)
    for size in (32, 64):
        probe.policy.log.clear()
        kind.run(pipe, height=size, width=size)
        assert [index for _, index, _ in probe.steps()] == [0, 0, 1, 1, 2, 2, 3, 3]


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["first step", "second step", "inside the model"])
def test_a_run_after_a_broken_one(where, pipe_of):
    """An exception in the middle leaves nothing behind: neither the step count nor a state."""
    pipe, kind = pipe_of("wan_v2v"), PIPES["wan_v2v"]
    probe = Probe(FullMap(pure=False), DenseSchedule(last_steps=1))
    sparsify(pipe, probe)
    good = kind.run(pipe)
    expected = [(run, layer, calls) for run, layer, calls in probe.policy.log]

    def stop(pipe, index, timestep, kwargs):
        if index == (0 if where == "first step" else 1):
            raise Broken
        return kwargs

    hook = None
    if where == "inside the model":
        hook = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Broken()))
    with pytest.raises(Broken):
        kind.run(pipe, callback_on_step_end=None if hook else stop)
    if hook is not None:
        hook.remove()
    probe.policy.log.clear()
    assert torch.equal(kind.run(pipe), good)
    assert probe.policy.log == expected


def test_attaching_again_replaces(pipe_of):
    pipe, kind = pipe_of("wan"), PIPES["wan"]
    stock = kind.run(pipe)
    for processor in (RadialProcessor(), DenseProcessor(), RadialProcessor(decay=0.5)):
        pipe.set_attn_processor(processor)
        assert len(layers_of(pipe)) == 2
        assert not any(isinstance(layer.stock, LayerProcessor) for layer in layers_of(pipe))
        assert len(pipe.transformer._forward_pre_hooks) == 1
    pipe.set_attn_processor(processor)
    assert processor.binding.resolved.policy.decay == 0.5
    restore(pipe)
    assert torch.equal(kind.run(pipe), stock)


def test_both_experts_count_as_one(pipe_of):
    pipe, kind = pipe_of("wan22"), PIPES["wan22"]
    processor = RadialProcessor(first_steps=0)
    pipe.set_attn_processor(processor)
    assert "wan2.2-a14b" in repr(processor)
    assert processor.binding.resolved.policy.decay == 0.8
    kind.run(pipe)
    report = processor.report()
    assert report.steps == kind.steps
    assert report.dense_calls + report.sparse_calls == kind.steps * 2 * 2


def test_negative_and_positive_prompts_of_different_lengths(pipe_of):
    """Mochi batches both: each sample has its own text length in the layout."""
    pipe, kind = pipe_of("mochi"), PIPES["mochi"]
    stock = kind.run(pipe, prompt=["dance monkey a cat", "a"], negative_prompt=["", "cat"])
    pipe.set_attn_processor(DenseProcessor())
    ours = kind.run(pipe, prompt=["dance monkey a cat", "a"], negative_prompt=["", "cat"])
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_several_videos_of_a_prompt(pipe_of):
    pipe, kind = pipe_of("hunyuan"), PIPES["hunyuan"]
    stock = kind.run(pipe, prompt=["dance monkey a cat", "a"], num_videos_per_prompt=2)
    pipe.set_attn_processor(DenseProcessor())
    ours = kind.run(pipe, prompt=["dance monkey a cat", "a"], num_videos_per_prompt=2)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


def test_a_pipeline_of_the_same_components(pipe_of):
    """`from_pipe` shares transformer and scheduler: what is bound to one also serves the other."""
    from diffusers import WanVideoToVideoPipeline

    pipe = pipe_of("wan")
    probe = Probe()
    sparsify(pipe, probe)
    other = WanVideoToVideoPipeline(
        **{name: pipe.components[name] for name in ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")}
    )
    probe.policy.log.clear()
    PIPES["wan_v2v"].run(other)
    assert [index for _, index, _ in probe.steps()] == [0, 0, 1, 1, 2, 2]


def test_a_scheduler_that_stands_still_is_reported(pipe_of, caplog):
    pipe = pipe_of("wan")
    sparsify(pipe, DenseProcessor())
    scheduler = pipe.scheduler
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(scheduler)})
    PIPES["wan"].run(other)
    assert "does not advance" in caplog.text


def test_a_transformer_alone_counts_changed_timesteps(tiny_of):
    model, probe = tiny_of("wan"), Probe()
    sparsify(model, probe)
    inputs = TINY["wan"].inputs((1, 4, 4), 1, [])
    for timestep in (900.0, 900.0, 500.0, 500.0, 100.0, 900.0):
        with torch.no_grad():
            model(**{**inputs, "timestep": torch.full((1,), timestep)})
    assert probe.steps() == [(c, i, None) for c, i in (("0", 0), ("1", 0), ("0", 1), ("1", 1), ("0", 2), ("0", 0))]


def test_a_transformer_alone_with_num_steps(tiny_of):
    model = tiny_of("mochi")
    processor = RadialProcessor(first_steps=0.5, last_steps=1, num_steps=4, block=64)
    sparsify(model, processor)
    reports = []
    for timestep in (0.0, 300.0, 600.0, 900.0) * 2:
        inputs = {**TINY["mochi"].inputs((2, 16, 16), 1, [5]), "timestep": torch.full((1,), timestep)}
        with torch.no_grad():
            model(**inputs)
        reports.append(processor.report())
    assert [r.steps for r in reports] == [1, 2, 3, 4] * 2
    assert (reports[-1].dense_calls, reports[-1].sparse_calls) == (6, 2)


def test_a_pipeline_that_outlives_the_one_that_was_bound():
    """The scheduler is shared, and tells the step also when the first pipeline is gone."""
    pipe, kind = PIPES["wan"].build(), PIPES["wan_v2v"]
    from diffusers import WanVideoToVideoPipeline

    probe = Probe()
    sparsify(pipe, probe)
    names = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    other = WanVideoToVideoPipeline(**{name: pipe.components[name] for name in names})
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    kind.run(other)
    assert probe.steps() == [(branch, index, 3) for index in range(3) for branch in ("0", "1")]


def test_an_exchanged_scheduler_is_followed(pipe_of):
    from diffusers import UniPCMultistepScheduler

    pipe, kind, probe = pipe_of("wan"), PIPES["wan"], Probe()
    before = pipe.scheduler
    sparsify(pipe, probe)
    try:
        pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        kind.run(pipe)
    finally:
        pipe.scheduler = before
    assert [index for _, index, _ in probe.steps()] == [0, 0, 1, 1]


def test_a_clock_of_a_scheduler_without_a_step_reads_timesteps():
    class Pipe:
        scheduler = None

    clock = Clock(Pipe(), None)
    clock.tick(torch.tensor([[0.0, 7.0]]))
    assert (clock.run, clock.index, clock.total()) == (1, 0, None)


def test_copies_of_a_clock_follow_the_same_scheduler(pipe_of):
    pipe = pipe_of("wan")
    clock = copy.deepcopy(Clock(pipe, None))
    assert clock._scheduler() is pipe.scheduler


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_the_copy_of_a_bound_pipeline_follows_its_own_scheduler(pipe_of, name):
    pipe, kind = pipe_of(name), PIPES[name]

    def run(pipe, **more):
        return kind.run(pipe, height=96, width=96, num_frames=13, **more)

    def fail(*_):
        raise KeyboardInterrupt

    dense = run(pipe)
    sparsify(pipe, RadialProcessor(first_steps=1, first_layers=0, block=64, decay=0.3, sink=False))
    expected = run(pipe)
    assert not torch.equal(dense, expected)
    twin = copy.deepcopy(pipe)
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the original runs"))
    try:
        for _ in range(2):
            assert torch.equal(run(twin), expected)
        with pytest.raises(KeyboardInterrupt):
            run(twin, callback_on_step_end=fail)
        assert torch.equal(run(twin), expected), "a failed run of the copy has ended"
    finally:
        hook.remove()
    restore(twin)
    assert not isinstance(twin.transformer.blocks[0].attn1.processor, LayerProcessor)
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, LayerProcessor)


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_the_copy_of_a_bound_pipeline_is_bound_by_itself(pipe_of, tiny_of, name):
    pipe, processor = pipe_of(name), RadialProcessor()
    sparsify(pipe, processor)
    twin = copy.deepcopy(pipe)
    parts = [getattr(twin, part) for part in ("transformer", "transformer_2") if getattr(twin, part, None) is not None]
    own = tracker_of(twin.transformer).session.processor
    assert own is not processor
    assert {id(t) for t in own.binding.alive()} == {id(t) for t in parts}
    assert repr(own) == repr(processor)
    with pytest.raises(ValueError, match="is bound to another WanTransformer3DModel"):
        sparsify(tiny_of("wan"), own)
    restore(pipe)
    assert own.binding.resolved is not None
    restore(twin)
    assert (own.binding.alive(), own.binding.resolved) == ([], None)
    sparsify(tiny_of("wan"), own)


def test_the_copy_of_a_bound_processor_is_free(pipe_of, tiny_of):
    processor = RadialProcessor()
    sparsify(pipe_of("wan"), processor)
    sparsify(tiny_of("wan"), copy.deepcopy(processor))


def test_the_copy_of_a_pipeline_has_the_bar_of_its_own(pipe_of):
    pipe = copy.deepcopy(pipe_of("wan"))
    pipe.progress_bar = MethodType(lambda pipe, **_: pipe, pipe)
    sparsify(pipe, RadialProcessor())
    twin = copy.deepcopy(pipe)
    restore(twin)
    assert twin.progress_bar() is twin


def test_dense_steps_that_cover_the_run_are_reported(pipe_of, caplog):
    pipe, kind = pipe_of("wan"), PIPES["wan"]
    sparsify(pipe, RadialProcessor(first_steps=12))
    for runs in (1, 2):
        kind.run(pipe, num_inference_steps=8, negative_prompt=None, guidance_scale=1.0)
        assert caplog.text.count("WARNING") == runs, "once per run"
    assert (
        "first_steps=12 and last_steps=0 cover all 8 steps of this run: every call is dense; use 2, or the fraction "
        "0.24." in caplog.text
    )
    caplog.clear()
    for processor in (RadialProcessor(first_steps=1), RadialProcessor(), DenseProcessor()):
        sparsify(pipe, processor)
        kind.run(pipe)
    assert not caplog.text


def test_the_end_of_a_run_frees_plans(pipe_of):
    pipe, kind = pipe_of("wan"), PIPES["wan"]
    sparsify(pipe, RadialProcessor(first_steps=0))
    kind.run(pipe)
    layers = layers_of(pipe)
    assert [layer.plan for layer in layers] == [None, None]
    with torch.no_grad():
        pipe.transformer(**TINY["wan"].inputs((1, 4, 4), 1, []))
    assert all(layer.plan is not None for layer in layers)
    restore(pipe)
    assert [layer.plan for layer in layers] == [None, None]
    assert not pipe.transformer._forward_hooks


def test_the_second_expert_frees_what_the_first_has_kept(pipe_of):
    pipe, kind = pipe_of("wan22"), PIPES["wan22"]
    sparsify(pipe, Probe(FullMap(pure=False)))
    trackers = [vars(t)["_videosparse_tracker"] for t in (pipe.transformer, pipe.transformer_2)]
    kept = []

    def look(pipe, index, timestep, kwargs):
        kept.append([(bool(t.states), any(layer.plan is not None for _, layer in t.layers)) for t in trackers])
        return kwargs

    kind.run(pipe, callback_on_step_end=look)
    assert kept[0] == [(True, True), (False, False)]
    assert kept[-1] == [(False, False), (True, True)]


def test_layers_share_plans(tiny_of):
    """One dense plan, one for each map: what a forward costs does not grow with its depth."""
    model = TINY["hunyuan_video"].build(num_layers=3, num_single_layers=3)
    sparsify(model, RadialProcessor(first_steps=0, first_layers=2))
    TINY["hunyuan_video"].forward(model)
    plans = [layer.plan for _, layer in vars(model)["_videosparse_tracker"].layers]
    assert len({id(plan) for plan in plans[:2]}) == 1
    assert len({id(plan) for plan in plans[2:]}) == 1
    assert plans[0].key_mask.shape == (2, 5 * 15 * 25 + 12)


def test_a_hook_that_a_test_leaves_is_told_once_and_gone():
    built = {}

    def a_test_that(does):
        fixture = _shared(built, {"tiny wan": TINY["wan"].build}, "tiny ")
        does(next(fixture)("wan"))
        next(fixture, None)

    def leave_hook(model):
        model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("of another test"))

    a_test_that(lambda model: sparsify(model, RadialProcessor()))
    with pytest.raises(AssertionError, match="leaves its hooks"):
        a_test_that(leave_hook)
    a_test_that(TINY["wan"].forward)
