"""Small random-weight pipelines as folders, with the strides of the embedded model. Nothing is downloaded.

Import from a test of generation or of the command line: their `conftest.py` puts this file on the path.
"""

from pathlib import Path

import torch

PROMPT = "a red circle bounces"

ABOUT = {
    "format": "videosparse-lora-1", "base_model": "small", "family": "wan", "layers": 2, "heads": 2,
    "component": "transformer", "method": "radial", "options": {"decay": 0.7}, "first_steps": 0.5, "first_layers": 1,
    "frames": [9, 17],
}  # fmt: skip
"""What videosparse writes into the header of a LoRA, of the small model."""


def save_wan(
    folder: Path, *, heads: int = 2, head_dim: int = 24, layers: int = 2, text_length: int = 48, experts: int = 1
) -> Path:
    """A WanPipeline that compresses 4x in time and 4x in space, like the embedded model, in less than 1 MB.

    Args:
        folder: where to.
        heads, head_dim, layers: of a transformer.
        text_length: tokens of a prompt.
        experts: 2 for one that shares its run by noise, as Wan2.2-A14B does: the second takes over at level .875.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        scale_factor_temporal=4, scale_factor_spatial=4, latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    )  # fmt: skip
    transformer, *second = (
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head_dim, in_channels=8, out_channels=8,
            text_dim=32, freq_dim=32, ffn_dim=32, num_layers=layers, rope_max_seq_len=64,
        )
        for _ in range(experts)
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    shared = {"transformer_2": second[0], "boundary_ratio": 0.875} if second else {}
    pipe = WanPipeline(
        tokenizer=_tokenizer(text_length), text_encoder=_text_encoder(), vae=vae, scheduler=scheduler,
        transformer=transformer, **shared,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def _tokenizer(length: int):
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def _text_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()
