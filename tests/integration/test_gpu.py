"""Families and pipelines on a GPU: Triton kernels, half precision, compiled blocks."""

from pipes import PIPES, TINY, assert_as_accurate

import pytest
import torch

from videosparse import AdaSpaProcessor, DenseProcessor, RadialProcessor, sparsify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WIDTHS = {
    "hunyuan_video": {"attention_head_dim": 64, "rope_axes_dim": (16, 24, 24)},
}
SPARSE = {"decay": 0.2, "first_steps": 0, "first_layers": 0, "sink": False}


def on_gpu(name, dtype):
    tiny = TINY[name]
    model = tiny.build(**WIDTHS.get(name, {"attention_head_dim": 64})).to("cuda", dtype)
    torch.manual_seed(1)
    inputs = {}
    for key, value in tiny.inputs((5, 15, 25), 2, [12, 7]).items():
        half = value.is_floating_point() and key != "timestep"
        inputs[key] = value.to("cuda", dtype) if half else value.to("cuda")
    return model, inputs


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", TINY)
def test_dense_is_as_close_to_full_precision_as_stock(name):
    model, inputs = on_gpu(name, torch.bfloat16)
    exact, wide = on_gpu(name, torch.float32)
    truth, stock = forward(exact, wide), forward(model, inputs)
    sparsify(model, DenseProcessor())
    assert_as_accurate(forward(model, inputs), stock, truth)


@pytest.mark.parametrize("name", TINY)
def test_triton_equals_torch(name):
    model, inputs = on_gpu(name, torch.bfloat16)
    processor = RadialProcessor(**SPARSE, backend="triton")
    sparsify(model, processor)
    fast = forward(model, inputs)
    assert processor.report().backend == "triton"
    assert processor.report().density < 0.9
    sparsify(model, RadialProcessor(**SPARSE, backend="torch"))
    slow = forward(model, inputs)
    exact, wide = on_gpu(name, torch.float32)
    sparsify(exact, RadialProcessor(**SPARSE, backend="torch"))
    truth = forward(exact, wide)
    assert_as_accurate(fast, slow, truth)


@pytest.mark.parametrize("name", TINY)
def test_autocast(name):
    """Norms give float32 q and k, linears bfloat16 v."""
    model, inputs = on_gpu(name, torch.float32)
    truth = forward(model, inputs)
    with torch.autocast("cuda", torch.bfloat16):
        stock = forward(model, inputs)
        processor = DenseProcessor()
        sparsify(model, processor)
        assert_as_accurate(forward(model, inputs), stock, truth)
        joint = not name.startswith("wan")
        assert processor.report().dense_backend == ("videosparse triton" if joint else "native SDPA")
        sparsify(model, RadialProcessor(**SPARSE, backend="torch"))
        slow = forward(model, inputs)
        sparsify(model, RadialProcessor(**SPARSE, backend="triton"))
        fast = forward(model, inputs)
    sparsify(model, RadialProcessor(**SPARSE, backend="torch"))
    assert_as_accurate(fast, slow, forward(model, inputs))


@pytest.mark.parametrize("name", TINY)
def test_whose_backward_dense_layers_take_in_training(name):
    """Ours where text lengths are masked, which torch's fast kernels cannot do; else that of Diffusers."""
    model, inputs = on_gpu(name, torch.bfloat16)
    sparsify(model.train(), DenseProcessor())
    out = model(**inputs, return_dict=False)[0]
    nodes, kinds = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in kinds:
            kinds.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    names = {node.name() for node in kinds}
    assert any("videosparse" in n for n in names) == (not name.startswith("wan")), names


@pytest.mark.parametrize("name", ["wan", "hunyuan_true_cfg", "mochi"])
def test_planning_does_not_wait_for_the_device(name):
    """From the second step of a run on; the first one looks up where its timestep stands among the scheduler's."""
    kind = PIPES[name]
    pipe = kind.build().to("cuda")
    calls = []

    def watch(*_):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > kind.calls else "default")

    def stop(*_):
        torch.cuda.set_sync_debug_mode("default")

    processor = RadialProcessor(**{**SPARSE, "first_steps": 2})
    sparsify(pipe, processor)
    pipe.transformer.register_forward_pre_hook(watch, prepend=True)
    pipe.transformer.register_forward_pre_hook(stop)
    try:
        kind.run(pipe, height=128, width=128, num_inference_steps=4)
    finally:
        stop()
    assert len(calls) == 4 * kind.calls
    assert (processor.report().dense_calls, processor.report().sparse_calls) == (4 * kind.calls, 4 * kind.calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_compiled_blocks(name):
    def two_steps(model, inputs):
        model._reset_stateful_cache()
        return [forward(model, {**inputs, "timestep": torch.full((2,), t, device="cuda")}) for t in (900.0, 500.0)]

    model, inputs = on_gpu(name, torch.bfloat16)
    exact, wide = on_gpu(name, torch.float32)
    for each in (model, exact):
        sparsify(each, RadialProcessor(**{**SPARSE, "first_steps": 1, "num_steps": 2}))
    truth, eager = two_steps(exact, wide), two_steps(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)
    for compiled, plain, true in zip(two_steps(model, inputs), eager, truth, strict=True):
        assert_as_accurate(compiled, plain, true)


def test_model_cpu_offload():
    kind = PIPES["wan"]
    pipe = kind.build()
    pipe.enable_model_cpu_offload()
    processor = RadialProcessor(**SPARSE)
    pipe.set_attn_processor(processor)
    videos = [kind.run(pipe, height=128, width=128).cpu() for _ in range(3)]
    assert processor.report().sparse_calls == 8
    assert all(torch.equal(v, videos[0]) for v in videos)


def five_steps(model, inputs):
    model._reset_stateful_cache()
    return [forward(model, {**inputs, "timestep": torch.full((2,), 900.0 - t, device="cuda")}) for t in range(5)]


@pytest.mark.parametrize("name", TINY)
def test_adaspa(name):
    """With every block it is as accurate as stock; with fewer it is the same twice."""
    model, inputs = on_gpu(name, torch.bfloat16)
    exact, wide = on_gpu(name, torch.float32)
    truth, stock = five_steps(exact, wide), five_steps(model, inputs)
    sparsify(model, AdaSpaProcessor(density=1.0, num_steps=5))
    for ours, plain, true in zip(five_steps(model, inputs), stock, truth, strict=True):
        assert_as_accurate(ours, plain, true)
    videos = []
    for more in ({}, {}, {"offload_state": True}):
        processor = AdaSpaProcessor(density=0.3, num_steps=5, backend="triton", **more)
        sparsify(model, processor)
        videos.append(five_steps(model, inputs)[-1])
        assert processor.report().backend == "triton"
        assert processor.report().density < 0.5
    assert all(torch.equal(video, videos[0]) for video in videos)


@pytest.mark.parametrize("more", [{}, {"sample": 16, "lse_dtype": "bfloat16"}, {"offload_state": True}], ids=str)
def test_searching_does_not_wait_for_the_device(more, monkeypatch):
    """Attention of searches, refreshes and sparse calls, once kernels are compiled."""
    from videosparse.processors import LayerProcessor

    core, watched = LayerProcessor.core, []

    def watching(self, *arguments):
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            return core(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(LayerProcessor, "core", watching)
    model, inputs = on_gpu("hunyuan_video", torch.bfloat16)
    sparsify(model, AdaSpaProcessor(density=0.3, num_steps=5, **more))
    first = five_steps(model, inputs)
    watched.append(True)
    for one, other in zip(first, five_steps(model, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_adaspa_in_compiled_blocks():
    model, inputs = on_gpu("wan", torch.bfloat16)
    exact, wide = on_gpu("wan", torch.float32)
    for each in (model, exact):
        sparsify(each, AdaSpaProcessor(density=1.0, num_steps=5))
    truth, eager = five_steps(exact, wide), five_steps(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)
    for compiled, plain, true in zip(five_steps(model, inputs), eager, truth, strict=True):
        assert_as_accurate(compiled, plain, true)
