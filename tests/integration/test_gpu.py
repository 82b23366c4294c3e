"""Families and pipelines on a GPU: Triton kernels, half precision, compiled blocks."""

from pipes import PIPES, TINY

import pytest
import torch

from videosparse import DenseProcessor, RadialProcessor, sparsify

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
        return model(**inputs, return_dict=False)[0].float()


@pytest.mark.parametrize("name", TINY)
def test_dense_is_as_close_to_full_precision_as_stock(name):
    model, inputs = on_gpu(name, torch.bfloat16)
    exact, wide = on_gpu(name, torch.float32)
    truth, stock = forward(exact, wide), forward(model, inputs)
    sparsify(model, DenseProcessor())
    assert (forward(model, inputs) - truth).abs().mean() <= 2 * (stock - truth).abs().mean()


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
    assert (fast - truth).abs().mean() <= 2 * (slow - truth).abs().mean()


@pytest.mark.parametrize("name", TINY)
def test_a_planned_forward_does_not_wait_for_the_device(name):
    """From the second forward of a shape on: reading the timestep of a bare transformer is the only wait."""
    model, inputs = on_gpu(name, torch.bfloat16)
    sparsify(model, RadialProcessor(**SPARSE))
    forward(model, inputs)
    tracker = vars(model)["_videosparse_tracker"]
    inputs.pop("timestep")
    torch.cuda.set_sync_debug_mode("error")
    try:
        tracker.before_forward(model, (), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_compiled_blocks(name):
    model, inputs = on_gpu(name, torch.bfloat16)
    sparsify(model, RadialProcessor(**{**SPARSE, "first_steps": 1, "num_steps": 2}))
    eager = [forward(model, {**inputs, "timestep": torch.full((2,), t, device="cuda")}) for t in (900.0, 500.0)]
    model._reset_stateful_cache()
    model.compile_repeated_blocks(fullgraph=True)
    compiled = [forward(model, {**inputs, "timestep": torch.full((2,), t, device="cuda")}) for t in (900.0, 500.0)]
    for one, other in zip(eager, compiled, strict=True):
        assert (one - other).abs().mean() <= 0.02 * one.abs().mean()


def test_model_cpu_offload():
    kind = PIPES["wan"]
    pipe = kind.build()
    pipe.enable_model_cpu_offload()
    processor = RadialProcessor(**SPARSE)
    pipe.set_attn_processor(processor)
    videos = [kind.run(pipe, height=128, width=128).cpu() for _ in range(3)]
    assert processor.report().sparse_calls == 8
    assert all(torch.equal(v, videos[0]) for v in videos)
