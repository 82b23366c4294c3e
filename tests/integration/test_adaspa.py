"""AdaSpa from a processor to a video: schedules, branches, experts, step caches, compiling, memory, refusals."""

from collections import Counter
from pipes import PIPES, TINY

import pytest
import torch
from searches import GRID, modes_of, run, trackers_of

from videosparse import AdaSpaProcessor, RadialProcessor, restore, searching, sparsify
from videosparse.blocks import PackedIndex
from videosparse.kernels import attend
from videosparse.policies.base import Mode

EVERY = pytest.mark.parametrize("name", PIPES)
ONE_OF_A_FAMILY = pytest.mark.parametrize("name", ["wan", "hunyuan_true_cfg", "mochi"])


@EVERY
def test_full_density_equals_stock(name, pipe_of):
    """Searches, refreshes and sparse calls on maps that keep everything; both experts, image and video inputs, too."""
    pipe, kind = pipe_of(name), PIPES[name]
    stock = kind.run(pipe, num_inference_steps=4)
    processor = AdaSpaProcessor(density=1.0, refresh=0.7)
    pipe.set_attn_processor(processor)
    ours = kind.run(pipe, num_inference_steps=4)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5)
    report = processor.report()
    assert report.sparse_calls > 0
    assert (report.density, report.video_density, report.average_density) == (1.0, 1.0, 1.0)
    restore(pipe)
    assert torch.equal(kind.run(pipe, num_inference_steps=4), stock)


@ONE_OF_A_FAMILY
def test_generation(name, pipe_of, planned):
    """The default schedule, the same video twice, its report from counts; dense comes back after `restore`."""
    pipe, kind = pipe_of(name), PIPES[name]
    stock = run(name, pipe)
    processor = AdaSpaProcessor(density=0.3)
    pipe.set_attn_processor(processor)
    first = run(name, pipe)
    contexts = ["cond_uncond"] if name == "mochi" else ["cond", "uncond"]
    expected = {0: "search", 1: "sparse", 2: "sparse", 3: "refresh", 4: "sparse", 5: "sparse"}
    for context in contexts:
        for layer in range(kind.layers):
            assert modes_of(planned, context, layer) == expected
    report = processor.report()
    assert (report.dense_calls, report.sparse_calls) == (kind.calls * kind.layers, 5 * kind.calls * kind.layers)
    assert report.search_calls == 2 * kind.calls * kind.layers, "the search and the refresh"
    plan = planned[-1][2]
    assert (report.density, report.video_density) == pytest.approx(plan.selection.densities(plan.index.shape))
    assert report.video_density == pytest.approx(0.3, abs=0.06)
    assert report.average_density == pytest.approx((1 + 5 * report.density) / 6)
    assert not torch.equal(first, stock)
    planned.clear()
    assert torch.equal(run(name, pipe), first)
    assert modes_of(planned, contexts[0]) == expected
    restore(pipe)
    assert torch.equal(run(name, pipe), stock)


def test_one_step_searches_for_nobody(pipe_of, planned, caplog):
    pipe = pipe_of("wan")
    stock = PIPES["wan"].run(pipe, num_inference_steps=1)
    processor = AdaSpaProcessor()
    sparsify(pipe, processor)
    assert torch.equal(PIPES["wan"].run(pipe, num_inference_steps=1), stock)
    assert not planned
    report = processor.report()
    assert (report.search_calls, report.sparse_calls, report.average_density) == (0, 0, 1.0)
    assert "A run of one step has no map to search for: every call is dense; use at least 2 steps." in caplog.text


@pytest.mark.parametrize("steps", [2, 4, 8, 40, 50])
def test_runs_of_every_length(steps, pipe_of, planned):
    pipe = pipe_of("wan")
    processor = AdaSpaProcessor(first_layers=1)
    sparsify(pipe, processor)
    PIPES["wan"].run(pipe, num_inference_steps=steps)
    search = max(1, round(0.2 * steps)) - 1
    modes = modes_of(planned, "uncond", 1)
    assert not [number for _, number, _ in planned if number == 0], "a dense layer"
    assert list(modes) == list(range(search, steps))
    assert modes.pop(search) == "search"
    refresh = [index for index, mode in modes.items() if mode == "refresh"]
    assert refresh == [{2: 1, 4: 2, 8: 4, 40: 23, 50: 29}[steps]]
    assert processor.report().sparse_calls == 2 * (steps - search - 1)


def test_what_is_read_is_what_was_found(pipe_of, monkeypatch):
    """The map of a step is the one that the policy selects from that search's sums; other branches have their own."""
    pipe = pipe_of("wan")
    processor = AdaSpaProcessor(density=0.3)
    sums, kept = [], {}
    block_sums, sparse = searching.block_sums, attend

    def spy_sums(q, k, lse, **kwargs):
        sums.append(block_sums(q, k, lse, **kwargs))
        return sums[-1]

    def spy_attend(q, k, v, **kwargs):
        if kwargs["index"] is not None:
            kept.setdefault(len(sums), []).append(kwargs["index"])
        return sparse(q, k, v, **kwargs)

    monkeypatch.setattr("videosparse.searching.block_sums", spy_sums)
    monkeypatch.setattr("videosparse.processors.attend", spy_attend)
    sparsify(pipe, processor)
    run("wan", pipe)
    assert len(sums) == 2 * 2 * 2, "search and refresh, in two branches and two layers"
    policy, layout = processor.binding.resolved.policy, processor.binding.record.layout
    expected = [policy.select(x, layout) for x in sums]
    sparse_before = kept[4][:4]  # the step after the search: both layers of cond, then of uncond
    for found, wanted in zip(sparse_before, expected[:4], strict=True):
        total = int(wanted.row_ptr[-1])
        assert torch.equal(found.row_ptr, wanted.row_ptr)
        assert torch.equal(found.ids[:total], wanted.ids[:total])
        assert torch.equal(found.order, wanted.order)
    assert not torch.equal(sums[1], sums[3]), "the second layer has seen the prompt: branches differ"
    last = kept[8][-4:]
    for found, wanted in zip(last, expected[4:], strict=True):
        assert torch.equal(found.ids[: int(wanted.row_ptr[-1])], wanted.ids[: int(wanted.row_ptr[-1])])


def test_every_expert_searches_at_its_own_first_step(pipe_of, planned):
    pipe = pipe_of("wan22")
    sparsify(pipe, AdaSpaProcessor(first_steps=1, refresh=(0.6, 0.9)))
    held = []

    def look(pipe, index, timestep, kwargs):
        held.append([bool(tracker.states) for tracker in trackers_of(pipe)])
        return kwargs

    run("wan22", pipe, num_inference_steps=10, callback_on_step_end=look)
    modes = [(run.index, str(plan.mode)) for run, layer, plan in planned if (run.context, layer) == ("cond", 0)]
    searches = [index for index, mode in modes if mode == "search"]
    assert len(searches) == 2
    assert searches[0] == 0
    # what is due by the second search counts as done
    refreshes = [index for index, mode in modes if mode == "refresh"]
    assert refreshes == [index for index in (5, 8) if index > searches[1]]
    assert [sum(both) for both in held[:-1]] == [1] * (len(held) - 1), "one expert's state at a time"
    assert held[-1] == [False, False] or held[-1] == [False, True]


def test_an_expert_with_one_step_searches_for_nobody(pipe_of, planned):
    pipe = pipe_of("wan22")
    sparsify(pipe, AdaSpaProcessor(first_steps=0, refresh=()))
    clock = trackers_of(pipe)[0].session.clock
    run("wan22", pipe, num_inference_steps=2)
    assert [clock.part(expert) for expert in (0, 1)] == [(0, 1), (1, 1)]
    assert not planned
    run("wan22", pipe, num_inference_steps=4)
    assert [clock.part(expert) for expert in (0, 1)] == [(0, 2), (2, 2)]
    assert [str(plan.mode) for *_, plan in planned if plan.mode is not Mode.SPARSE] == ["search"] * 8, "both experts"


@pytest.mark.parametrize("name", ["wan", "hunyuan_true_cfg", "mochi"])
@pytest.mark.parametrize("skipped", ["search", "refresh"])
def test_first_block_cache(name, skipped, planned):
    """A layer that a step cache skips has found nothing: the next forward plans the search again."""
    from diffusers import FirstBlockCacheConfig

    kind = PIPES[name]
    pipe = kind.build()
    schedule = {"search": {"first_steps": 2, "refresh": ()}, "refresh": {"first_steps": 1, "refresh": 3}}[skipped]
    sparsify(pipe, AdaSpaProcessor(density=0.3, **schedule))
    plain = run(name, pipe)
    planned.clear()
    # everything is skipped from the second step on, but what the cache is told to compute
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    cached = run(name, pipe)
    context = "cond_uncond" if name == "mochi" else "cond"
    first, later = modes_of(planned, context, 0), modes_of(planned, context, kind.layers - 1)
    if skipped == "search":
        assert first == {1: "search", 2: "sparse", 3: "sparse", 4: "sparse", 5: "sparse"}
        assert later == dict.fromkeys(range(1, 5), "search"), "it has never run, and then nobody would read"
    else:
        assert first == {0: "search", 1: "sparse", 2: "refresh", 3: "sparse", 4: "sparse", 5: "sparse"}
        assert later == {0: "search", 1: "sparse", **dict.fromkeys(range(2, 6), "refresh")}
    assert torch.equal(run(name, pipe), cached)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(run(name, pipe), plain, rtol=0, atol=1e-4)


def test_a_skipped_search_is_made_up_for(planned, monkeypatch):
    """Once the cache lets the layer run again, it searches, and is sparse from there on."""
    tiny = TINY["wan"]
    model = tiny.build()
    processor = AdaSpaProcessor(density=0.3, num_steps=6, first_steps=2, refresh=())
    sparsify(model, processor)
    block = model.blocks[1]
    forward = block.forward
    torch.manual_seed(1)
    inputs = tiny.inputs(GRID, 1, [12])
    for step in range(6):
        skips = step in (1, 2)
        block.forward = (lambda hidden_states, *_: hidden_states) if skips else forward
        with torch.no_grad():
            model(**{**inputs, "timestep": torch.full((1,), 900.0 - step)})
    assert modes_of(planned, "0", 0) == {1: "search", 2: "sparse", 3: "sparse", 4: "sparse", 5: "sparse"}
    assert modes_of(planned, "0", 1) == {1: "search", 2: "search", 3: "search", 4: "sparse", 5: "sparse"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "mochi"])
def test_compiled_blocks_make_four_graphs(name):
    """Dense, search, refresh and sparse: 12 steps of two branches, and none more in a second run."""
    tiny = TINY[name]
    blocks = {"hunyuan_video": {"num_layers": 2, "num_single_layers": 2}}.get(name, {"num_layers": 3})
    graphs = {}
    for ours in (False, True):
        torch._dynamo.reset()
        model, count = tiny.build(**blocks), Counter()
        if name == "mochi" and not ours:
            # the stock processor cannot be compiled in one graph; its last block drops its text, so there are two kinds
            graphs[ours] = Counter({"MochiTransformerBlock": 2})
            continue
        if ours:
            processor = AdaSpaProcessor(density=0.3, num_steps=12)
            sparsify(model, processor)
            eager = branches(tiny, model)
            model._reset_stateful_cache()
        compile_counting(model, count)
        compiled = branches(tiny, model)
        graphs[ours] = Counter(count)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    attending = {kind: n for kind, n in graphs[False].items() if kind.endswith("TransformerBlock")}
    assert attending
    assert {kind: graphs[True][kind] for kind in attending} == {kind: 4 * n for kind, n in attending.items()}
    model._reset_stateful_cache()
    for one, other in zip(eager, branches(tiny, model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert count == graphs[True]


def branches(tiny, model):
    torch.manual_seed(0)
    texts = [tiny.inputs((3, 8, 8), 2, [12, 7]), tiny.inputs((3, 8, 8), 2, [3, 5])]
    out = []
    with torch.no_grad():
        for step in range(12):
            for context, inputs in zip(("cond", "uncond"), texts, strict=True):
                inputs["timestep"] = torch.full((2,), 900.0 - 50 * step)
                with model.cache_context(context):
                    out.append(model(**inputs, return_dict=False)[0])
    return out


def compile_counting(model, count):
    from torch._dynamo.backends.debugging import aot_eager

    for kind in getattr(model, "_repeated_blocks", None) or ["MochiTransformerBlock"]:

        def backend(graph, example, kind=kind):
            count[kind] += 1
            return aot_eager(graph, example)

        model._repeated_blocks = [kind]
        model.compile_repeated_blocks(fullgraph=True, backend=backend)


def test_a_compiled_layer_says_that_it_has_searched():
    """The note is a side effect of a compiled graph; without it every step would search."""
    tiny = TINY["wan"]
    torch._dynamo.reset()
    model = tiny.build()
    sparsify(model, AdaSpaProcessor(density=0.3, num_steps=4, first_steps=1, refresh=()))
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    layers = vars(model)["_videosparse_tracker"].layers
    found = []
    for step in range(3):
        with torch.no_grad():
            model(**{**tiny.inputs((3, 8, 8), 1, []), "timestep": torch.full((1,), 900.0 - step)})
        found.append([(str(layer.plan.mode), layer.searched) for _, layer in layers])
    assert found == [[("search", True)] * 2, [("sparse", True)] * 2, [("sparse", True)] * 2]


@ONE_OF_A_FAMILY
def test_state_in_the_memory_of_the_cpu(name, pipe_of, planned):
    """The same video; buffers do not move. On a CPU the copies are made all the same."""
    pipe = pipe_of(name)
    sparsify(pipe, AdaSpaProcessor(density=0.3))
    plain = run(name, pipe)
    planned.clear()
    sparsify(pipe, AdaSpaProcessor(density=0.3, offload_state=True))
    assert torch.equal(run(name, pipe), plain)
    assert all(plan.offloaded and plan.index.bits.device.type == "cpu" for _, _, plan in planned)
    assert len({id(plan.index) for _, layer, plan in planned if layer == 0}) == PIPES[name].calls


@pytest.mark.parametrize("how", ["modules", "forwards"])
def test_state_in_the_memory_of_the_cpu_and_compiled_blocks(how):
    from videosparse.generation.compiling import compile_blocks

    model = TINY["wan"].build()
    sparsify(model, AdaSpaProcessor(num_steps=4, offload_state=True))
    if how == "modules":
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        compile_blocks(model, backend="eager")
    with pytest.raises(RuntimeError, match=r"offload_state=True copies maps .* not work in compiled blocks; drop it"):
        TINY["wan"].forward(model, (3, 8, 8))


def test_a_normaliser_in_bfloat16(pipe_of, planned):
    """Only the refresh reads it: the video differs from there on, and little."""
    pipe = pipe_of("wan")
    sparsify(pipe, AdaSpaProcessor(density=0.3))
    plain = run("wan", pipe)
    sparsify(pipe, AdaSpaProcessor(density=0.3, lse_dtype="bfloat16"))
    planned.clear()
    half = run("wan", pipe)
    assert {plan.lse.dtype for _, _, plan in planned if plan.lse is not None} == {torch.bfloat16}
    sparsify(pipe, RadialProcessor())
    assert (half - plain).abs().mean() <= 0.2 * (run("wan", pipe) - plain).abs().mean()


def test_a_search_over_some_rows(pipe_of):
    pipe = pipe_of("wan")
    videos = []
    for sample in (None, 16, 64):
        sparsify(pipe, AdaSpaProcessor(density=0.3, block=64, sample=sample))
        videos.append(run("wan", pipe))
    assert torch.equal(videos[0], videos[2]), "64 of 64 rows are all"
    assert not torch.equal(videos[0], videos[1])


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "mochi"])
def test_adapters(name):
    """LoRA layers change what is searched."""
    from peft import LoraConfig

    targets = {"wan": r".*attn1\.(to_q|to_k)", "hunyuan_video": r".*transformer_blocks\.\d+\.attn\.(to_q|to_k)",
               "mochi": r".*attn1\.(to_q|to_k)"}  # fmt: skip
    tiny = TINY[name]
    model = tiny.build()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets[name], init_lora_weights=False))
    model.requires_grad_(False)
    torch.manual_seed(1)
    inputs = tiny.inputs(GRID, 1, [12])

    def last():
        sparsify(model, AdaSpaProcessor(density=0.3, num_steps=3, refresh=3))
        for timestep in (900.0, 600.0, 300.0):
            with torch.no_grad():
                out = model(**{**inputs, "timestep": torch.full((1,), timestep)}, return_dict=False)[0]
        return out

    on = last()
    assert torch.equal(on, last())
    model.disable_adapters()
    assert (last() - on).abs().max() > 1e-4


@pytest.mark.parametrize("first", ["offload", "sparsify"])
def test_model_cpu_offload(first):
    kind = PIPES["wan"]
    pipe = kind.build()
    processor = AdaSpaProcessor(density=0.3)
    if first == "sparsify":
        sparsify(pipe, processor)
    pipe.enable_model_cpu_offload(device="cpu")
    sparsify(pipe, processor)
    videos = [run("wan", pipe) for _ in range(2)]
    assert torch.equal(*videos)
    assert not trackers_of(pipe)[0].states
    restore(pipe)
    pipe.remove_all_hooks()
    sparsify(pipe, AdaSpaProcessor(density=0.3))
    assert torch.equal(run("wan", pipe), videos[0])


def test_training(tiny_of):
    model = TINY["wan"].build().train()
    sparsify(model, AdaSpaProcessor())
    with pytest.raises(RuntimeError, match="AdaSpaPolicy keeps state between steps and cannot be trained with"):
        model(**TINY["wan"].inputs((1, 4, 4), 1, []))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refresh": 0.1}, r"refresh=0\.1 is step 1, and step 1 searches; refresh at step 2 or later"),
        ({"refresh": 3, "first_steps": 3}, "refresh=3 is step 3 of 6, which is not after the search at step 3"),
    ],
)
def test_a_refresh_that_comes_too_early(arguments, message, pipe_of):
    pipe = pipe_of("wan")
    sparsify(pipe, AdaSpaProcessor(**arguments))
    with pytest.raises(ValueError, match=message):
        run("wan", pipe)


def test_a_refresh_that_comes_too_early_is_refused_at_once_where_the_steps_are_known():
    with pytest.raises(ValueError, match="refresh=2 is step 2 of 8, which is not after the search at step 2"):
        AdaSpaProcessor(refresh=2, num_steps=8)


def test_fractions_without_a_pipeline(tiny_of):
    model = tiny_of("wan")
    for arguments, message in (
        ({}, r"first_steps=0\.2 is a fraction .* pass num_steps="),
        ({"first_steps": 2}, r"refresh=0\.6 is a fraction .* pass num_steps="),
    ):
        sparsify(model, AdaSpaProcessor(**arguments))
        with pytest.raises(ValueError, match=message):
            TINY["wan"].forward(model, (1, 4, 4))
    for arguments in ({"num_steps": 10}, {"first_steps": 2, "refresh": (5, 7)}):
        sparsify(model, AdaSpaProcessor(**arguments))
        TINY["wan"].forward(model, (1, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must lie in 0\.\.1, 0 excluded \(got 0\.0\)"),
        ({"recall_threshold": 2}, ValueError, "recall_threshold must lie"),
        ({"sample": 5}, ValueError, "sample must be one of 8, 16, 32, 64"),
        ({"lse_dtype": "half"}, ValueError, "lse_dtype must be float32 or bfloat16"),
        ({"refresh": "soon"}, TypeError, r"refresh must be made of numbers \(got 'soon'\)"),
        ({"refresh": None}, TypeError, "refresh must be made of numbers"),
        ({"block": 96}, ValueError, "each 64 or 128"),
        ({"first_steps": 1.5}, ValueError, "first_steps must be"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"num_steps": 0}, ValueError, "num_steps must be an int of at least 1"),
    ],
)
def test_values_that_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaSpaProcessor(**arguments)


def test_what_repr_shows(pipe_of):
    processor = AdaSpaProcessor(density=0.3, refresh=[0.5, 30])
    assert repr(processor) == "AdaSpaProcessor(density=0.3, refresh=(0.5, 30))"
    sparsify(pipe_of("wan"), processor)
    shown = repr(processor)
    for part in (
        "density=0.3", "refresh=(0.5, 30)", "block=(128, 64)", "head_adaptive=True", "recall_threshold=0.8",
        "sample=16", "lse_dtype='float32'", "first_steps=0.2", "last_steps=0", "first_layers=0",
    ):  # fmt: skip
        assert part in shown
    assert shown.endswith(" on wan2.1 (WanTransformer3DModel, 2 layers)")


def test_the_search_is_dense_on_the_sequence_that_sparse_calls_read(pipe_of, planned):
    """HunyuanVideo: text starts on a fresh block from the search on, and the lse has that length."""
    sparsify(pipe_of("hunyuan_true_cfg"), AdaSpaProcessor(density=0.3, block=128))
    run("hunyuan_true_cfg", pipe_of("hunyuan_true_cfg"))
    plan = planned[0][2]
    assert plan.mode is Mode.SEARCH
    assert plan.layout.text_start % 128 == 0
    assert isinstance(plan.index, PackedIndex)
    assert plan.lse.shape[2] == plan.index.q_len == plan.layout.length
