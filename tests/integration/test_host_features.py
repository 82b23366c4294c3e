"""What Diffusers offers beside attention keeps working: offloading, adapters, fusing, caches, backends, compiling."""

import dataclasses
from collections import Counter
from pipes import PIPES, TINY

import pytest
import torch
from probes import Probe

from videosparse import DenseProcessor, RadialProcessor, restore, sparsify
from videosparse.kernels import dense
from videosparse.models import family_of
from videosparse.processors import LayerProcessor

EVERY = pytest.mark.parametrize("name", TINY)
SPARSE = {"decay": 0.2, "first_steps": 0, "first_layers": 0, "sink": False}


@pytest.mark.parametrize("first", ["offload", "sparsify"])
def test_model_cpu_offload(first):
    """Offloading swaps `forward` between two generations; "offloaded" from the CPU to the CPU here."""
    kind = PIPES["wan"]
    pipe = kind.build()
    processor = RadialProcessor(**SPARSE)
    plain = {"height": 128, "width": 128}
    if first == "sparsify":
        sparsify(pipe, processor)
    pipe.enable_model_cpu_offload(device="cpu")
    forward = vars(pipe.transformer)["forward"]
    sparsify(pipe, processor)
    assert vars(pipe.transformer)["forward"] is forward, "forward belongs to offloading"
    reports = []
    videos = []
    for _ in range(3):
        videos.append(kind.run(pipe, **plain))
        reports.append(processor.report())
    assert all(torch.equal(v, videos[0]) for v in videos)
    assert [r.sparse_calls for r in reports] == [8, 8, 8]
    restore(pipe)
    pipe.remove_all_hooks()
    stock = kind.run(pipe, **plain)
    assert not torch.equal(stock, videos[0])
    assert torch.equal(stock, kind.run(kind.build(), **plain))


@EVERY
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(name, kind):
    tiny = TINY[name]
    model = tiny.build()
    sparsify(model, RadialProcessor(**SPARSE))
    plain = tiny.forward(model, (3, 8, 8))
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **groups)
    assert torch.equal(tiny.forward(model, (3, 8, 8)), plain)
    restore(model)
    assert not torch.equal(tiny.forward(model, (3, 8, 8)), plain)


TARGETS = {
    "wan": r".*blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "wan_vace": r".*blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "hunyuan_video": r".*transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|add_q_proj|to_add_out)",
    "mochi": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|add_k_proj)",
}


def with_adapter(name):
    from peft import LoraConfig

    model = TINY[name].build()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights=False))
    return model


@EVERY
def test_adapters(name):
    """LoRA layers wrap the projections, which processors call and never look into."""
    tiny, model = TINY[name], with_adapter(name)
    stock = tiny.forward(model, (3, 4, 5))
    sparsify(model, DenseProcessor())
    torch.testing.assert_close(tiny.forward(model, (3, 4, 5)), stock, rtol=0, atol=1e-5)
    sparsify(model, RadialProcessor(**SPARSE))
    on = tiny.forward(model, (3, 8, 8))
    model.disable_adapters()
    assert (tiny.forward(model, (3, 8, 8)) - on).abs().max() > 1e-4


@EVERY
def test_training_an_adapter_with_gradient_checkpointing(name):
    """Checkpointing runs forward twice with the same plan: gradients are those without it. No schedule of steps."""
    tiny, model = TINY[name], with_adapter(name).train()
    processor = RadialProcessor(decay=0.2, sink=False, first_steps=5, first_layers=1)
    sparsify(model, processor)
    torch.manual_seed(1)
    inputs = tiny.inputs((3, 8, 8), 2, [12, 7])

    def gradients():
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    modes = [layer.plan.mode for layer in map(processor_of, family_of(model).attentions(model))]
    assert modes[0] == "dense"
    assert modes[-1] == "sparse"
    assert len([n for n, g in plain.items() if "lora_A" in n and g.abs().max() > 0]) >= len(modes) - 1
    model.enable_gradient_checkpointing()
    again = gradients()
    assert again.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def processor_of(attention):
    return attention.module.processor


def test_training_does_not_count_as_a_run():
    model = TINY["wan"].build()
    processor = RadialProcessor(**SPARSE)
    sparsify(model, processor)
    TINY["wan"].forward(model, (3, 8, 8))
    before = processor.report()
    model.train()
    model(**TINY["wan"].inputs((3, 8, 8), 1, []), return_dict=False)[0].mean().backward()
    assert processor.report() == before


@EVERY
def test_fused_projections(name):
    tiny = TINY[name]
    model = tiny.build()
    sparsify(model, RadialProcessor(**SPARSE))
    apart = tiny.forward(model, (3, 8, 8))
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"{type(model).__name__} cannot fuse projections")
    model.fuse_qkv_projections()
    if name.startswith("wan"):
        # were to_qkv ignored, breaking the separate weights would be seen
        for block in model.blocks:
            torch.nn.init.zeros_(block.attn1.to_q.weight)
    torch.testing.assert_close(tiny.forward(model, (3, 8, 8)), apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "hunyuan_true_cfg", "mochi"])
def test_first_block_cache(name):
    """Skips later blocks where the first one changes little: on top of sparse attention, in both orders."""
    from diffusers import FirstBlockCacheConfig

    kind = PIPES[name]
    pipe = kind.build()
    sizes = {"height": 128, "width": 128, "num_inference_steps": 4}
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    pipe.set_attn_processor(RadialProcessor(**SPARSE))
    never = kind.run(pipe, **sizes)
    pipe.transformer.disable_cache()
    plain = kind.run(pipe, **sizes)
    torch.testing.assert_close(never, plain, rtol=0, atol=1e-4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    skipping = kind.run(pipe, **sizes)
    assert not torch.equal(skipping, plain)
    assert torch.equal(kind.run(pipe, **sizes), skipping)
    restore(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(kind.run(pipe, **sizes), kind.run(kind.build(), **sizes))


@pytest.fixture
def _default_backend():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    yield
    _AttentionBackendRegistry.set_active_backend(type(_AttentionBackendRegistry._active_backend)("native"))


@EVERY
@pytest.mark.usefixtures("_default_backend")
def test_the_chosen_backend_serves_dense_calls(name, monkeypatch):
    """Set before or after attaching, it reaches our layers; after restoring, the stock processors have it."""
    used = []
    dispatch = __import__("videosparse._diffusers", fromlist=["x"]).dispatch_attention_fn

    def spy(*args, backend, **kwargs):
        used.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr("videosparse._diffusers.dispatch_attention_fn", spy)
    model = TINY[name].build()
    attentions = family_of(model).attentions(model)
    own = all(hasattr(a.module.processor, "_attention_backend") for a in attentions)
    model.set_attention_backend("_native_math")
    sparsify(model, DenseProcessor())
    TINY[name].forward(model, (1, 4, 4))
    assert set(used) == {"_native_math" if own else None}
    model.set_attention_backend("native")
    sparsify(model, DenseProcessor())
    used.clear()
    TINY[name].forward(model, (1, 4, 4))
    assert set(used) == {"native"}
    restore(model)
    backends = {getattr(a.module.processor, "_attention_backend", None) for a in attentions}
    assert backends == {"native" if own else None}
    assert not any("_attention_backend" in vars(a.module.processor) for a in attentions) or own


@pytest.fixture
def _fake_gpu(monkeypatch):
    monkeypatch.setattr("videosparse.dense_plans.describe_backend", lambda device: ("triton", ""))


def bfloat16_inputs(name, grid=(3, 4, 5)):
    torch.manual_seed(1)
    inputs = TINY[name].inputs(grid, 2, [12, 7])
    return {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", ["hunyuan_video", "mochi", "wan"])
@pytest.mark.usefixtures("_default_backend", "_fake_gpu")
def test_dense_calls_with_text_take_our_kernel_on_a_gpu(name, monkeypatch):
    """In half precision, and unless a backend was chosen; Wan, without a mask, keeps the host's."""
    from videosparse import processors

    calls = []
    attend = processors.attend

    def spy(*args, **kwargs):
        calls.append(kwargs["index"])
        return attend(*args, **kwargs)

    monkeypatch.setattr("videosparse.processors.attend", spy)
    model, processor = TINY[name].build().to(torch.bfloat16), DenseProcessor()
    inputs = bfloat16_inputs(name)
    sparsify(model, processor)
    ours = "native SDPA" if name == "wan" else "videosparse triton"

    def run(grad=False):
        calls.clear()
        with torch.set_grad_enabled(grad):
            model(**inputs)
        return len(calls), None if grad else processor.report().dense_backend

    assert run() == (0 if name == "wan" else 2, ours)
    assert run(grad=True)[0] == (0 if name == "wan" else 2)
    model.set_attention_backend("_native_math")
    sparsify(model, processor)
    assert run() == (0, "_native_math")
    model.set_attention_backend("native")
    sparsify(model, processor)
    assert run() == (0, "native SDPA")
    model = TINY[name].build()
    sparsify(model, DenseProcessor())
    TINY[name].forward(model, (3, 4, 5))
    assert not calls, "fp32 is for who wants torch's own rounding"


@pytest.mark.usefixtures("_default_backend")
def test_dense_calls_without_text_take_the_fastest_library(monkeypatch):
    """When generating, unless a backend was chosen; compiled blocks see one node."""
    asked, calls = [], []
    fa3 = dense.DENSE_KERNELS["fa3"]

    def attend_like_fa3(q, k, v, scale):
        calls.append(scale)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)

    def fastest(*call):
        asked.append(call)
        return "fa3"

    monkeypatch.setitem(dense.DENSE_KERNELS, "fa3", dataclasses.replace(fa3, attend=attend_like_fa3))
    monkeypatch.setattr("videosparse.dense_plans.fastest_dense", fastest)
    model, processor = TINY["wan"].build(), DenseProcessor()
    with torch.no_grad():
        stock = TINY["wan"].forward(model, (3, 4, 5))
        sparsify(model, processor)
        torch.testing.assert_close(TINY["wan"].forward(model, (3, 4, 5)), stock)
        assert processor.report().dense_backend == "FlashAttention-3"
        head_dim = model.config.attention_head_dim
        assert asked == [(torch.device("cpu"), torch.float32, head_dim, 60)]
        assert calls == [head_dim**-0.5] * len(model.blocks)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(TINY["wan"].forward(model, (3, 4, 5)), stock)
        model.set_attention_backend("native")
        calls.clear()
        TINY["wan"].forward(model, (3, 4, 5))
    assert not calls


@EVERY
def test_regional_compile_makes_one_graph_per_mode(name):
    """Six steps of two branches, dense and sparse ones: as many graphs as stock needs, once per mode, no break."""
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
            sparsify(model, RadialProcessor(decay=0.2, first_steps=2, last_steps=1, first_layers=0, num_steps=6))
            eager = branches(tiny, model)
            model._reset_stateful_cache()
        compile_counting(model, count)
        compiled = branches(tiny, model)
        graphs[ours] = count
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    attending = {kind: n for kind, n in graphs[False].items() if kind.endswith("TransformerBlock")}
    assert attending
    assert {kind: graphs[True][kind] for kind in attending} == {kind: 2 * n for kind, n in attending.items()}


def branches(tiny, model):
    torch.manual_seed(0)
    texts = [tiny.inputs((3, 8, 8), 2, [12, 7]), tiny.inputs((3, 8, 8), 2, [3, 5])]
    out = []
    with torch.no_grad():
        for step in range(6):
            for context, inputs in zip(("cond", "uncond"), texts, strict=True):
                inputs["timestep"] = torch.full((2,), 900.0 - 100 * step)
                with model.cache_context(context):
                    out.append(model(**inputs, return_dict=False)[0])
    return out


def compile_counting(model, count):
    kinds = getattr(model, "_repeated_blocks", None) or ["MochiTransformerBlock"]
    for kind in kinds:

        def backend(graph, example, kind=kind):
            count[kind] += 1
            return graph

        model._repeated_blocks = [kind]
        model.compile_repeated_blocks(fullgraph=True, backend=backend)


def test_a_compiled_transformer_in_a_pipeline(pipe_of):
    """Regional compile is the form to use; a wrapped model is at least found, followed and restored."""
    pipe, kind = pipe_of("wan"), PIPES["wan"]
    inner = pipe.transformer
    torch._dynamo.reset()
    pipe.transformer = torch.compile(inner, backend="eager")
    try:
        probe = Probe()
        sparsify(pipe, probe)
        assert isinstance(inner.blocks[0].attn1.processor, LayerProcessor)
        kind.run(pipe)
        assert [index for _, index, _ in probe.steps()] == [0, 0, 1, 1]
        restore(pipe)
        assert not isinstance(inner.blocks[0].attn1.processor, LayerProcessor)
    finally:
        pipe.transformer = inner


def test_deep_copies_are_bound_on_their_own(tiny_of):
    import copy

    model = TINY["wan"].build()
    sparsify(model, RadialProcessor(**SPARSE))
    twin = copy.deepcopy(model)
    assert torch.equal(TINY["wan"].forward(twin, (3, 8, 8)), TINY["wan"].forward(model, (3, 8, 8)))
    restore(twin)
    assert isinstance(model.blocks[0].attn1.processor, LayerProcessor)
    assert not isinstance(twin.blocks[0].attn1.processor, LayerProcessor)


def test_nothing_of_ours_is_saved(tmp_path):
    model = TINY["wan"].build()
    sparsify(model, RadialProcessor(**SPARSE))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    restore(model)
    assert torch.equal(TINY["wan"].forward(again, (1, 4, 4)), TINY["wan"].forward(model, (1, 4, 4)))
