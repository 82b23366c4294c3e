"""PAROAttention from a processor to a video: plans calibrated here, online, branches, compiling, memory, training."""

import gc
import weakref
from collections import Counter
from pipes import PIPES, TINY

import pytest
import torch
from calibrations import calibrated
from test_host_features import branches, compile_counting

from videosparse import PAROProcessor, restore, sparsify
from videosparse.blocks import unpack_rows
from videosparse.ordering import AXIS_ORDERS
from videosparse.policies import PAROPolicy
from videosparse.policies.base import Mode

EVERY = pytest.mark.parametrize("name", PIPES)
ONE_OF_A_FAMILY = pytest.mark.parametrize("name", ["wan", "hunyuan_true_cfg", "mochi"])
FRAMES = {"wan": 9, "wan_vace": 9, "hunyuan_true_cfg": 9, "mochi": 13}
WIDE = {"height": 192, "width": 256}


def sizes(name):
    return {**WIDE, "num_frames": FRAMES[name], "num_inference_steps": 6}


def run(name, pipe, **more):
    return PIPES[name].run(pipe, **{**sizes(name), **more})


@pytest.fixture(scope="module")
def plan_of():
    """`plan_of(name, pipe)`: its plan at the size of these tests, calibrated once."""
    plans = {}

    def get(name, pipe, **more):
        key = name, *sorted(more.items())
        if key not in plans:
            kind = PIPES[name]
            common = {
                "prompt": "dance monkey", "max_sequence_length": 16, "generator": torch.Generator().manual_seed(1),
            }  # fmt: skip
            plans[key] = calibrated(pipe, {**common, **kind.arguments(), **sizes(name)}, **more)
        return plans[key]

    return get


@pytest.fixture
def planned(monkeypatch):
    """What was planned: (run, layer, plan), in order."""
    log, plan = [], PAROPolicy.plan

    def spy(self, layout, run, layer, state, **given):
        found = plan(self, layout, run, layer, state, **given)
        log.append((run, layer, found))
        return found

    monkeypatch.setattr(PAROPolicy, "plan", spy)
    return log


@EVERY
def test_online_at_full_density_equals_stock(name, pipe_of):
    """A search in the first step, then chosen orders on maps that keep everything: only rounding differs."""
    pipe, kind = pipe_of(name), PIPES[name]
    stock = kind.run(pipe, num_inference_steps=4)
    processor = PAROProcessor(density=1.0)
    pipe.set_attn_processor(processor)
    ours = kind.run(pipe, num_inference_steps=4)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5)
    report = processor.report()
    assert report.sparse_calls > 0
    assert (report.density, report.video_density) == (1.0, 1.0)
    restore(pipe)
    assert torch.equal(kind.run(pipe, num_inference_steps=4), stock)


@ONE_OF_A_FAMILY
def test_generation_by_a_plan(name, pipe_of, plan_of, planned, tmp_path):
    """From the file; every step reads its part's map in the layer's order; the same video twice; dense comes back."""
    pipe, kind = pipe_of(name), PIPES[name]
    stock = run(name, pipe)
    plan = plan_of(name, pipe)
    assert torch.equal(run(name, pipe), stock), "calibration leaves nothing behind"
    plan.save(tmp_path / "plan.safetensors")
    processor = PAROProcessor(tmp_path / "plan.safetensors", first_steps=1)
    pipe.set_attn_processor(processor)
    first = run(name, pipe)
    assert {run.index for run, _, _ in planned} == {1, 2, 3, 4, 5}
    for step, layer, call in planned:
        assert call.mode is Mode.SPARSE
        assert list(call.order.codes) == plan.codes[layer].tolist()
        bucket = [0, 0, 1, 2, 2, 2][step.index]
        assert torch.equal(call.index.bits, plan.index(call.layout, layer, bucket, torch.device("cpu")).bits)
    report = processor.report()
    assert (report.dense_calls, report.sparse_calls) == (kind.calls * kind.layers, 5 * kind.calls * kind.layers)
    assert report.video_density == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(first, stock)
    assert torch.equal(run(name, pipe), first)
    assert (first - stock).norm() / stock.norm() < 0.2
    restore(pipe)
    assert torch.equal(run(name, pipe), stock)


@ONE_OF_A_FAMILY
def test_a_plan_of_full_maps_equals_stock(name, pipe_of, plan_of):
    """Whatever the orders: reordering, and its inverse, change nothing but rounding."""
    pipe = pipe_of(name)
    stock = run(name, pipe)
    plan = plan_of(name, pipe, density=1.0)
    generator = torch.Generator().manual_seed(0)
    plan.codes.copy_(torch.randint(0, 6, plan.codes.shape, generator=generator))
    plan._orders.clear()
    pipe.set_attn_processor(PAROProcessor(plan, first_steps=0))
    torch.testing.assert_close(run(name, pipe), stock, rtol=0, atol=2e-5)


def test_a_plan_is_stock_attention_behind_the_masks_that_its_names_and_bits_mean(pipe_of, plan_of, monkeypatch):
    """Orders are read by sorting places by the axes of their names, nothing of ours; masks are token by token."""
    pipe, kind = pipe_of("wan"), PIPES["wan"]
    plan = plan_of("wan", pipe, density=0.35, buckets=2)
    grid, (rows, columns) = plan.grid, plan.facts.block
    plan.codes.copy_(torch.randint(1, 6, plan.codes.shape, generator=torch.Generator().manual_seed(2)))
    plan._orders.clear()
    places = [(f, h, w) for f in range(grid.frames) for h in range(grid.height) for w in range(grid.width)]

    def mask(layer, bucket):
        found = torch.zeros(1, plan.facts.heads, grid.tokens, grid.tokens, dtype=torch.bool)
        for head, code in enumerate(plan.codes[layer].tolist()):
            axes = ["FHW".index(axis) for axis in AXIS_ORDERS[code]]
            read = sorted(range(grid.tokens), key=lambda t: [places[t][axis] for axis in axes])
            at = torch.tensor(read).argsort()  # where each raster token is read
            keep = unpack_rows(plan.bits[layer, bucket, head], plan.blocks[1])
            found[0, head] = keep[at // rows][:, at // columns]
        return found

    masks = [[mask(layer, bucket) for bucket in range(3)] for layer in range(plan.facts.layers)]
    stock, calls = torch.nn.functional.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, **more):
        if query.shape[2] == key.shape[2] == grid.tokens:
            layer, step = len(calls) % plan.facts.layers, len(calls) // (plan.facts.layers * kind.calls)
            calls.append(step)
            attn_mask = masks[layer][[0, 0, 1, 2, 2, 2][step]]
        return stock(query, key, value, attn_mask=attn_mask, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        expected = run("wan", pipe)
    assert len(calls) == 6 * kind.calls * plan.facts.layers
    pipe.set_attn_processor(PAROProcessor(plan, first_steps=0))
    torch.testing.assert_close(run("wan", pipe), expected, rtol=0, atol=2e-5)


@ONE_OF_A_FAMILY
def test_generation_online(name, pipe_of, planned):
    pipe, kind = pipe_of(name), PIPES[name]
    processor = PAROProcessor(density=0.3, block=64)
    pipe.set_attn_processor(processor)
    first = run(name, pipe)
    modes = Counter((run.index, str(plan.mode)) for run, _, plan in planned)
    calls = kind.calls * kind.layers
    assert modes == {(0, "search"): calls, **{(i, "sparse"): calls for i in range(1, 6)}}
    assert processor.report().video_density == pytest.approx(0.3, abs=0.05)
    assert torch.equal(run(name, pipe), first)


def test_online_maps_serve_another_size_with_the_orders_of_a_plan(pipe_of, plan_of, planned):
    pipe = pipe_of("wan")
    plan = plan_of("wan", pipe)
    pipe.set_attn_processor(PAROProcessor(plan))
    with pytest.raises(ValueError, match=r"are for grid 3x12x16 .*, this video has grid 3x16x12; .* online_maps=True"):
        run("wan", pipe, height=256, width=192)
    processor = PAROProcessor(plan, online_maps=True)
    pipe.set_attn_processor(processor)
    planned.clear()
    run("wan", pipe, height=256, width=192)
    sparse = [(layer, call) for _, layer, call in planned if call.mode is Mode.SPARSE]
    assert sparse
    for layer, call in sparse:
        assert list(call.order.codes) == plan.codes[layer].tolist()
    assert processor.report().video_density == pytest.approx(plan.density, abs=0.05)


def test_a_batch_of_videos(pipe_of, plan_of):
    """Maps of a plan serve every sample: each video of a batch is what it is alone."""
    pipe = pipe_of("wan")
    pipe.set_attn_processor(PAROProcessor(plan_of("wan", pipe), first_steps=1))
    seeds = [3, 4]
    batch = run("wan", pipe, num_videos_per_prompt=2, generator=[torch.Generator().manual_seed(s) for s in seeds])
    for video, seed in zip(batch, seeds, strict=True):
        alone = run("wan", pipe, generator=[torch.Generator().manual_seed(seed)])[0]
        torch.testing.assert_close(video, alone, rtol=0, atol=1e-5)


def test_maps_are_freed_with_the_run(pipe_of, plan_of):
    pipe = pipe_of("wan")
    plan = plan_of("wan", pipe)
    pipe.set_attn_processor(PAROProcessor(plan, first_steps=0))
    held = []

    def look(pipe, index, timestep, tensors):
        gc.collect()
        held.append(len(plan._uploads))
        return tensors

    run("wan", pipe, callback_on_step_end=look)
    layers = plan.facts.layers
    assert held == [2 * layers] * 3 + [layers] * 3, "this part of the run and the next"
    gc.collect()
    assert len(plan._uploads) == 0


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_compiled_blocks_are_one_graph_per_mode(name, online):
    """Orders and maps differ from layer to layer, and from step to step: nothing is compiled again."""
    tiny = TINY[name]
    blocks = {"hunyuan_video": {"num_layers": 2, "num_single_layers": 2}}.get(name, {"num_layers": 3})
    graphs = {}
    for ours in (False, True):
        torch._dynamo.reset()
        model, count = tiny.build(**blocks), Counter()
        if name == "mochi" and not ours:
            graphs[ours] = Counter({"MochiTransformerBlock": 2})  # see test_host_features
            continue
        if ours:
            sparsify(model, _processor(model, online))
            eager = branches(tiny, model)
            model._reset_stateful_cache()
        compile_counting(model, count)
        compiled = branches(tiny, model)
        graphs[ours] = count
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    attending = {kind: n for kind, n in graphs[False].items() if kind.endswith("TransformerBlock")}
    modes = 3 if online else 2
    assert {kind: graphs[True][kind] for kind in attending} == {kind: modes * n for kind, n in attending.items()}


def _processor(model, online):
    """Random orders and maps for grid 3x8x8, or an online search."""
    from videosparse.blocks import pack_rows
    from videosparse.models import family_of
    from videosparse.policies.paro_plan import PAROPlan, PlanFacts, plain_config

    if online:
        return PAROProcessor(density=0.5, first_steps=2, num_steps=6, block=64)
    layers, heads = len(family_of(model).attentions(model)), model.config.num_attention_heads
    counts = torch.full((layers, 3, heads), 2, dtype=torch.int32)
    rank = torch.rand(layers, 3, heads, 3, 3).argsort(-1).argsort(-1)
    facts = PlanFacts(
        model_class=type(model).__name__, config=plain_config(model.config), grid=(3, 8, 8), text=0, layers=layers,
        heads=heads, block=(64, 64), buckets=2, density=0.5, mass=None, video=(9, 64, 64),
    )  # fmt: skip
    codes = torch.randint(0, 6, (layers, heads), dtype=torch.uint8)
    return PAROProcessor(PAROPlan(codes, counts, pack_rows(rank < 2), facts), first_steps=1, num_steps=6)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloaded_layers(kind, plan_of):
    pipe = PIPES["wan"].build()
    pipe.set_attn_processor(PAROProcessor(plan_of("wan", pipe), first_steps=1))
    expected = run("wan", pipe)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **groups)
    assert torch.equal(run("wan", pipe), expected)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "mochi"])
def test_training_with_a_plan(name):
    """Through checkpointing to the bit, on the map of the second half; without a plan it is refused."""
    model = TINY[name].build().train()
    processor = _processor(model, online=False)
    sparsify(model, processor)
    torch.manual_seed(1)
    inputs = TINY[name].inputs((3, 8, 8), 2, [12, 7])

    def gradients():
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    layer = vars(model)["_videosparse_tracker"].layers[0][1]
    wanted = processor.plan.index(layer.plan.layout, 0, 2, torch.device("cpu")).block_map().index()
    assert torch.equal(layer.plan.index.row_ptr, wanted.row_ptr)
    assert torch.equal(layer.plan.index.ids[: wanted.ids.numel()], wanted.ids)
    model.enable_gradient_checkpointing()
    again = gradients()
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[n], plain[n]) for n in plain)
    sparsify(model, PAROProcessor())
    with pytest.raises(RuntimeError, match="PAROPolicy keeps state between steps and cannot be trained with"):
        gradients()


def test_a_plan_of_another_model_or_for_two_experts_is_refused_at_binding(pipe_of, plan_of):
    plan = plan_of("wan", pipe_of("wan"))
    with pytest.raises(ValueError, match="is for a WanTransformer3DModel, this model is a MochiTransformer3DModel"):
        pipe_of("mochi").set_attn_processor(PAROProcessor(plan))
    with pytest.raises(ValueError, match="the plan is for one transformer, and this pipeline has 2 experts"):
        pipe_of("wan22").set_attn_processor(PAROProcessor(plan))
    with pytest.raises(ValueError, match="with num_layers=2, this model has num_layers=3"):
        sparsify(TINY["wan"].build(num_layers=3), PAROProcessor(plan))


def test_context_parallelism():
    from types import SimpleNamespace

    config = SimpleNamespace(ring_degree=1, ulysses_degree=2, ring_anything=False)
    model = TINY["wan"].build()
    plan = _processor(model, online=False).plan
    sparsify(model, PAROProcessor(plan, online_maps=True, first_steps=1, num_steps=6))
    for block in model.blocks:
        block.attn1.processor._parallel_config = SimpleNamespace(context_parallel_config=config)
    with pytest.raises(NotImplementedError, match=r"online_maps does not work with context parallelism"):
        TINY["wan"].forward(model, (3, 8, 8))


def test_arguments_are_checked_at_once(tmp_path):
    with pytest.raises(ValueError, match="There is no plan at"):
        PAROProcessor(tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="plan must be the path of a plan or a PAROPlan"):
        PAROProcessor(3)
    with pytest.raises(ValueError, match="density must lie in"):
        PAROProcessor(density=2.0)
    with pytest.raises(ValueError, match="online_maps=True keeps the orders of a plan"):
        PAROProcessor(online_maps=True)
    assert PAROProcessor(block=64).block == (64, 64)
    with pytest.raises(ValueError, match="quant must be None"):
        PAROProcessor(quant="int3")


def test_a_bound_processor_lets_go_of_its_plan(pipe_of, plan_of, tmp_path):
    pipe = PIPES["wan"].build()
    plan_of("wan", pipe).save(tmp_path / "plan.safetensors")
    processor = PAROProcessor(tmp_path / "plan.safetensors")
    gone = weakref.ref(processor)
    del processor
    gc.collect()
    assert gone() is None
