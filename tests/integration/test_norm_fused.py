"""Whole pipelines with queries and keys normed by one kernel, against the same step by step."""

from pipes import PIPES, TINY, assert_as_accurate

import pytest
import torch

from videosparse import DenseProcessor, RadialProcessor, sparsify
from videosparse.models import base

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
SPARSE = {"decay": 0.2, "first_steps": 1, "first_layers": 0, "sink": False}


@pytest.fixture
def fused(device, monkeypatch):
    """The value of `fused_norm` that fuses on this device; without a GPU, torch does what the kernel does."""
    if device == "cuda":
        return "on"
    monkeypatch.setattr(base, "missing", lambda *a: None)
    return "auto"


@DEVICES
@pytest.mark.parametrize("name", ["wan", "wan22", "hunyuan", "hunyuan_true_cfg", "mochi"])
def test_pipelines(name, device, fused):
    kind = PIPES[name]

    def run(dtype, fused_norm, latents=None):
        pipe = kind.build().to(device, dtype)
        sparsify(pipe, RadialProcessor(**SPARSE, fused_norm=fused_norm))
        return kind.run(pipe, height=128, width=128, latents=latents).float().cpu()

    latents = torch.randn(run(torch.float32, "off").shape)
    truth = run(torch.float32, "off", latents)
    steps = run(torch.bfloat16, "off", latents)
    ours = run(torch.bfloat16, fused, latents)
    assert not torch.equal(ours, steps)
    assert_as_accurate(ours, steps, truth)


@DEVICES
def test_image_to_video_and_control(device, fused):
    """Two pipelines whose inputs are made from images: in full precision they differ by rounding."""
    for name in ("wan_i2v", "wan_vace"):
        kind, videos = PIPES[name], []
        for fused_norm in ("off", fused):
            pipe = kind.build().to(device)
            sparsify(pipe, DenseProcessor(fused_norm=fused_norm))
            videos.append(kind.run(pipe).cpu())
        torch.testing.assert_close(videos[1], videos[0], rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("fused_norm", ["auto", "on"])
def test_compiled_blocks(name, fused_norm, monkeypatch):
    from videosparse.kernels import triton_norm

    ran, kernel = [], triton_norm.forward
    monkeypatch.setattr(triton_norm, "forward", lambda *a: ran.append(1) or kernel(*a))
    model = TINY[name].build()
    torch.manual_seed(1)
    inputs = {k: v.cuda() for k, v in TINY[name].inputs((3, 8, 8), 2, [12, 7]).items()}

    def forward(dtype, fused_norm, compiled):
        torch._dynamo.reset()
        twin = TINY[name].build().to("cuda", dtype)
        twin.load_state_dict(model.state_dict())
        sparsify(twin, DenseProcessor(fused_norm=fused_norm))
        if compiled:
            twin._repeated_blocks = getattr(twin, "_repeated_blocks", None) or ["MochiTransformerBlock"]
            twin.compile_repeated_blocks(fullgraph=True)
        halves = {k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}
        with torch.no_grad():
            return twin(**halves, return_dict=False)[0]

    truth, steps = forward(torch.float32, "off", False), forward(torch.bfloat16, "off", False)
    assert not ran
    assert_as_accurate(forward(torch.bfloat16, fused_norm, True), steps, truth)
    assert ran
