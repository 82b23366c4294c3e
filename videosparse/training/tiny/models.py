"""The three networks of the embedded model, and every size that fixes their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel


@dataclass(frozen=True)
class TinySizes:
    """Every size that fixes the weights. The defaults are the published model."""

    vae_base: int = 16
    z_dim: int = 8
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    ffn_dim: int = 640
    text_dim: int = 128
    text_ff: int = 256
    text_layers: int = 2
    vocab: int = 768


SMOKE_SIZES = TinySizes(vae_base=8, layers=2, heads=2, head_dim=24, ffn_dim=64, text_dim=32, text_ff=64)


def build_vae(
    sizes: TinySizes, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> AutoencoderKLWan:
    """The Wan VAE: 4x in time, 4x in space, `z_dim` channels."""
    return AutoencoderKLWan(
        base_dim=sizes.vae_base,
        z_dim=sizes.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=list(mean) if mean is not None else [0.0] * sizes.z_dim,
        latents_std=list(std) if std is not None else [1.0] * sizes.z_dim,
    )


def build_transformer(sizes: TinySizes) -> WanTransformer3DModel:
    """The DiT. The output projection starts at zero, so that training starts from the trivial prediction."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.z_dim,
        out_channels=sizes.z_dim,
        text_dim=sizes.text_dim,
        freq_dim=64,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
        rope_max_seq_len=512,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "condition_embedder" not in name:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    for name in ("time_embedder.linear_1", "time_embedder.linear_2", "text_embedder.linear_1"):
        nn.init.normal_(model.condition_embedder.get_submodule(name).weight, std=0.02)
    nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    return model


def build_text_encoder(sizes: TinySizes, vocab: int) -> UMT5EncoderModel:
    """A small UMT5 encoder without dropout; eager attention, because SDPA's mask check waits for the device."""
    config = UMT5Config(
        vocab_size=vocab,
        d_model=sizes.text_dim,
        d_kv=sizes.text_dim // 4,
        d_ff=sizes.text_ff,
        num_layers=sizes.text_layers,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    return UMT5EncoderModel(config)
