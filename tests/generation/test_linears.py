"""FP8 linears: which layers, how exact, beside LoRAs and processors; and every refusal."""

import importlib.util
from pipes import TINY

import float8
import pytest
import torch

from videosparse import RadialProcessor, sparsify
from videosparse.generation import GenerationError
from videosparse.generation import linears as module
from videosparse.generation.linears import quantize_linears, unavailable

SIZES = {
    "wan": {"attention_head_dim": 16, "ffn_dim": 64},
    "wan_vace": {"attention_head_dim": 16, "ffn_dim": 64},
    "hunyuan_video": {"attention_head_dim": 16, "rope_axes_dim": (4, 6, 6)},
    "mochi": {"attention_head_dim": 16, "num_attention_heads": 3, "pooled_projection_dim": 48},
}
# layers of one block's attentions and feed-forward parts, and how many blocks, as built here
COUNTS = {"wan": 2 * 10, "wan_vace": 3 * 10 + 2 * 10 + 3, "hunyuan_video": 12 + 5, "mochi": 12 + 9}


@pytest.fixture
def _any_device(monkeypatch):
    float8.allow(monkeypatch)


def build(name):
    return TINY[name].build(**SIZES[name]).to(torch.bfloat16)


def forward(name, model):
    torch.manual_seed(1)
    inputs = TINY[name].inputs((3, 8, 8), 2, [12, 7])
    half = {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}
    with torch.no_grad():
        return model(**half, return_dict=False)[0].float()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.usefixtures("_any_device")
def test_linears_of_the_blocks_become_fp8(name):
    model = build(name)
    plain = forward(name, model)
    count = quantize_linears(model)
    names = float8.names(model)
    assert count == len(names) == COUNTS[name]
    assert not [n for n in names if "norm" in n or "blocks." not in n or "refiner" in n or "embed" in n]
    rounded = forward(name, model)
    error = (rounded - plain).norm() / plain.norm()
    assert 0 < error < 0.1  # e4m3 has three bits of mantissa: 2^-4 a value at most, less in sums
    sparsify(model, RadialProcessor(decay=0.2, first_steps=0, first_layers=0, sink=False))
    sparse = forward(name, model)
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, rounded)


@pytest.mark.usefixtures("_any_device")
@pytest.mark.parametrize("first", ["lora", "fp8"])
def test_a_lora_is_added_in_bf16(first):
    from peft import LoraConfig

    model = build("wan")
    config = LoraConfig(r=16, target_modules=r".*attn1\.(to_q|to_v)", init_lora_weights=False)
    if first == "lora":
        model.add_adapter(config)
        model.to(torch.bfloat16)
    assert quantize_linears(model) == COUNTS["wan"]
    if first == "fp8":
        model.add_adapter(config)
        model.to(torch.bfloat16)
    assert not [n for n in float8.names(model) if "lora_" in n]
    on = forward("wan", model)
    model.disable_adapters()
    assert not torch.equal(forward("wan", model), on)


@pytest.mark.usefixtures("_any_device")
def test_what_cannot_be_quantized_is_told():
    model = build("wan")
    quantize_linears(model)
    with pytest.raises(GenerationError, match=r"no linear layer in the blocks .* is plain"):
        quantize_linears(model)
    with pytest.raises(GenerationError, match=r"needs weights in bfloat16 \(blocks\.0\..* is torch\.float32\)"):
        quantize_linears(TINY["wan"].build(**SIZES["wan"]))
    with pytest.raises(GenerationError, match="sides that are multiples of 16"):
        quantize_linears(TINY["wan"].build(ffn_dim=40).to(torch.bfloat16))
    with pytest.raises(TypeError, match="not supported"):
        quantize_linears(torch.nn.Linear(16, 16))


def test_none_changes_nothing():
    model = build("wan")
    assert quantize_linears(model, kind="none") == 0
    assert not float8.names(model)


def test_unknown_kinds_are_refused():
    with pytest.raises(GenerationError, match=r"Unknown linears 'fp9'; use none or fp8\. Did you mean 'fp8'\?"):
        quantize_linears(build("wan"), kind="fp9")


def test_a_gpu_that_torchao_refuses_is_told():
    """Its own words, on one line: this machine has none."""
    pytest.importorskip("torchao")
    if unavailable("cuda" if torch.cuda.is_available() else "cpu") is None:
        pytest.skip("this machine can")
    with pytest.raises(GenerationError, match=r"linears=fp8 cannot run here: .*; drop it"):
        quantize_linears(build("wan"))


def test_reasons(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "this run is on cpu" in str(unavailable("cpu"))
    assert "(got 8.0)" in str(unavailable("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert unavailable("cuda") is None
    assert "--dtype bf16" in str(unavailable("cuda", torch.float16))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert 'pip install -e ".[fp8]" in the clone' in str(unavailable("cuda"))


def test_missing_torchao_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(GenerationError, match=r"needs torchao .*pip install -e .\.\[fp8\]"):
        quantize_linears(build("wan"))
