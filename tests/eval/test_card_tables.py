"""The table of options by card."""

import pytest
import torch

from videosparse.benchmark import card_tables
from videosparse.benchmark.card_tables import FITS_NOT, Peaks, Rest, peaks
from videosparse.generation.estimating import Estimate, estimate
from videosparse.generation.planning import plan_request
from videosparse.generation.request import GenerationRequest


@pytest.mark.parametrize(
    ("room", "options"),
    [
        (60, ""),
        (40, "`--offload model`"),
        (36, "`--offload model --compile`"),
        (33, "`--offload group` or `--offload model --linears fp8 --compile`"),
        (15, "`--offload group`"),
        (9, FITS_NOT),
    ],
)
def test_options_are_the_cheapest_that_fit(room, options):
    assert Peaks(plain=60, parts=40, parts_compiled=36, parts_fp8=20, blocks=10).options(room) == options


def test_fp8_alone_may_fit():
    found = Peaks(plain=60, parts=40, parts_compiled=36, parts_fp8=20, blocks=30).options(25)
    assert found == "`--offload model --linears fp8 --compile`"


def needs(weights, activations):
    return Estimate("", 0, 0, 0, 0, weights=weights, activations=activations)


def test_parts_that_are_offloaded_take_turns():
    """An expert of two with what it needs, or the larger encoder; by blocks the VAE stays beside what is there."""
    ways = needs(100, 40), needs(100, 30), needs(50, 35), needs(12, 40)
    found = peaks(*ways, experts=2, rest=Rest(encoders=(70, 3), vae=2))
    assert found == Peaks(plain=215, parts=90, parts_compiled=80, parts_fp8=70, blocks=72)
    for most, blocks in ((60, 62), (9, 54)):
        assert peaks(*ways, experts=2, rest=Rest(encoders=(70, 3), vae=2, by_blocks=most)).blocks == blocks


def test_blocks_need_what_a_plan_with_groups_tells(monkeypatch):
    asked = []
    monkeypatch.setattr(card_tables, "SHOWN", ("wan2.1-14b-480p",))
    monkeypatch.setattr(card_tables, "peaks", lambda *ways: (asked.extend(ways), peaks(*ways))[1])
    card_tables.cards([])
    told = estimate(plan_request(GenerationRequest("any", "wan2.1-14b", method="dense", offload="group")))
    assert asked[3] == told
    assert told.weights == pytest.approx(2**30 * 1.74, rel=0.01)


def test_only_whole_transformers_count_as_measured():
    row = {"case": "wan2.1-14b 720x1280x81", "contender": "radial-eager", "layers": "40", "run": "2026-01-01"}
    rows = [
        {**row, "layers_timed": "40", "peak_gb": "35.433480192"},
        {**row, "layers_timed": "3", "peak_gb": "5", "run": "2026-02-01"},
        {**row, "case": "mochi 480x848x163", "layers_timed": "3", "layers": "48", "peak_gb": "5"},
    ]
    head, lines = card_tables.cards(rows)
    measured = {line[0]: line[head.index("measured")] for line in lines}
    assert measured.pop("`wan2.1-14b-720p`") == "33.0"
    assert set(measured.values()) == {""}


def test_weights_beside_the_transformer_are_those_of_the_published_configurations():
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLMochi, AutoencoderKLWan
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        LlamaConfig,
        LlamaModel,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    def size(build, config, each):
        return each * count(build(config))

    def config(layers):
        return LlamaConfig(vocab_size=128320, num_hidden_layers=layers, **llama)

    xxl = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    wan22 = {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12,
        "is_residual": True, "patch_size": 2, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
        "scale_factor_spatial": 16,
    }  # fmt: skip
    with torch.device("meta"):
        gated = {**xxl, "feed_forward_proj": "gated-gelu"}
        umt5 = size(UMT5EncoderModel, UMT5Config(vocab_size=256384, **gated), 2)
        t5 = size(T5EncoderModel, T5Config(vocab_size=32128, **gated), 2)
        clip = size(CLIPTextModel, CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12), 2)
        vaes = {
            "wan2.1": 4 * count(AutoencoderKLWan()),
            "wan2.2-a14b": 4 * count(AutoencoderKLWan()),
            "wan2.2-5b": 4 * count(AutoencoderKLWan(**wan22)),
            "hunyuan-video": 2 * count(AutoencoderKLHunyuanVideo()),
            "mochi": 2 * count(AutoencoderKLMochi()),
        }
        one, whole = (size(LlamaModel, config(layers), 2) for layers in (1, 32))
    layer = (whole - one) / 31
    assert card_tables._REST["hunyuan-video"].by_blocks == pytest.approx(one + layer, rel=2e-3)
    encoders = {"hunyuan-video": (whole, clip), "mochi": (t5,)}
    for variant, rest in card_tables._REST.items():
        assert rest.encoders == pytest.approx(encoders.get(variant, (umt5,)), rel=2e-3)
        assert rest.vae == pytest.approx(vaes[variant], rel=5e-3)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
