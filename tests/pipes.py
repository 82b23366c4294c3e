"""Tiny pipelines with random weights, built in memory: every published pipeline class that the package supports.

Configurations follow Diffusers' own tests; tokenizers are made of a few words, so that nothing is downloaded. The
`conftest.py` of a folder of tests makes this file importable (`from pipes import ...`) and takes its fixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = ["▁dance", "▁monkey", "▁negative", "▁a", "▁cat", "dance", "monkey"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(w, -2.5) for w in words] + [(c, -4.0) for c in LETTERS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def llama_tokenizer() -> Any:
    from transformers import LlamaTokenizer

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "▁": 4}
    for c in LETTERS + "{}<>|_ \n:,.":
        vocab.setdefault(c, len(vocab))
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", padding_side="right")


def llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=3, hidden_size=16, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=2, vocab_size=1000, hidden_act="gelu",
    )  # fmt: skip


def llama_encoder() -> Any:
    from transformers import LlamaModel

    torch.manual_seed(0)
    return LlamaModel(llama_config()).eval()


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    pieces = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)


def clip_text() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        hidden_size=8, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=1000,
        hidden_act="gelu", projection_dim=32,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        intermediate_size=16, patch_size=1,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def wan_vae(**more: Any) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    config = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**{**config, "temperal_downsample": [False, True, True], **more}).eval()


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64,
}  # fmt: skip


def wan_transformer(seed: int = 0, **more: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**WAN, **more}).eval()


def vace_transformer(**more: Any) -> Any:
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(0)
    config = {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96}
    return WanVACETransformer3DModel(**{**config, **more}).eval()


def hunyuan_transformer(**more: Any) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
        "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    return HunyuanVideoTransformer3DModel(**{**config, **more}).eval()


def mochi_transformer(**more: Any) -> Any:
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    config = {
        "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
        "pooled_projection_dim": 16, "in_channels": 12, "qk_norm": "rms_norm", "text_embed_dim": 32,
        "time_embed_dim": 4, "activation_fn": "swiglu", "max_sequence_length": 16,
    }  # fmt: skip
    model = MochiTransformer3DModel(**{**config, **more}).eval()
    # a fresh model has zero frequencies, which would leave the rotary embedding untested
    torch.nn.init.normal_(model.pos_frequencies, std=0.3)
    return model


def _euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=7.0)


def _unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _wan_text() -> dict[str, Any]:
    return {"text_encoder": t5_encoder(), "tokenizer": t5_tokenizer()}


def wan(**more: Any) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(transformer=wan_transformer(**more), vae=wan_vae(), scheduler=_euler(), **_wan_text())


def wan22() -> Any:
    from diffusers import WanPipeline

    experts = {"transformer": wan_transformer(0), "transformer_2": wan_transformer(1)}
    return WanPipeline(**experts, vae=wan_vae(), scheduler=_unipc(), **_wan_text(), boundary_ratio=0.875)


def wan22_5b() -> Any:
    from diffusers import WanPipeline

    vae = wan_vae(
        z_dim=48, in_channels=12, out_channels=12, is_residual=True, patch_size=2, latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48, scale_factor_spatial=16, scale_factor_temporal=4,
    )  # fmt: skip
    transformer = wan_transformer(in_channels=48, out_channels=48)
    return WanPipeline(transformer=transformer, vae=vae, scheduler=_unipc(), **_wan_text(), expand_timesteps=True)


def wan_i2v(added: bool = False) -> Any:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    # with image keys, as in the published 2.1 model, the length of the text is fixed at 512 there
    more = {"in_channels": 36, "image_dim": 4, **({"added_kv_proj_dim": 24} if added else {})}
    return WanImageToVideoPipeline(
        transformer=wan_transformer(**more), vae=wan_vae(), scheduler=_euler(), image_encoder=clip_vision(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32), **_wan_text(),
    )  # fmt: skip


def wan22_i2v() -> Any:
    from diffusers import WanImageToVideoPipeline

    experts = {"transformer": wan_transformer(0, in_channels=36), "transformer_2": wan_transformer(1, in_channels=36)}
    return WanImageToVideoPipeline(
        **experts, vae=wan_vae(), scheduler=_unipc(), **_wan_text(), image_encoder=None, image_processor=None,
        boundary_ratio=0.875,
    )  # fmt: skip


def wan_v2v() -> Any:
    from diffusers import WanVideoToVideoPipeline

    return WanVideoToVideoPipeline(transformer=wan_transformer(), vae=wan_vae(), scheduler=_unipc(), **_wan_text())


def wan_vace() -> Any:
    from diffusers import WanVACEPipeline

    return WanVACEPipeline(transformer=vace_transformer(), vae=wan_vae(), scheduler=_euler(), **_wan_text())


def _hunyuan_parts(**more: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLHunyuanVideo

    transformer = hunyuan_transformer(**more)
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        act_fn="silu", norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8,
        temporal_compression_ratio=4, mid_block_add_attention=True,
    ).eval()  # fmt: skip
    return {
        "transformer": transformer, "vae": vae, "scheduler": _euler(), "tokenizer": llama_tokenizer(),
        "text_encoder_2": clip_text(), "tokenizer_2": clip_tokenizer(),
    }  # fmt: skip


def hunyuan(**more: Any) -> Any:
    from diffusers import HunyuanVideoPipeline

    return HunyuanVideoPipeline(text_encoder=llama_encoder(), **_hunyuan_parts(**more))


def hunyuan_i2v() -> Any:
    from diffusers import HunyuanVideoImageToVideoPipeline
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=37, projection_dim=32, num_attention_heads=4, num_hidden_layers=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(), pad_token_id=3, image_token_index=999, image_seq_length=4
    )
    processor = CLIPImageProcessor(
        crop_size=28, do_center_crop=True, do_normalize=True, do_resize=True, resample=3, size=28
    )
    parts = _hunyuan_parts(in_channels=2 * 4 + 1, image_condition_type="latent_concat")
    text_encoder = LlavaForConditionalGeneration(config).eval()
    return HunyuanVideoImageToVideoPipeline(text_encoder=text_encoder, image_processor=processor, **parts)


def mochi(**more: Any) -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

    transformer = mochi_transformer(**more)
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    vae = AutoencoderKLMochi(latent_channels=12, out_channels=3, **widths, layers_per_block=(1, 1, 1, 1, 1)).eval()
    return MochiPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **_wan_text())


def cogvideox() -> Any:
    """A pipeline that the package does not support."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel, DDIMScheduler

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    return CogVideoXPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(), **_wan_text())


def image(size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Any:
    from PIL import Image

    return Image.new(mode, size, 128 if mode == "L" else (40, 120, 200))


@dataclass(frozen=True)
class Pipe:
    """One kind of pipeline and the arguments of a call that takes about a second.

    `calls` is the number of transformer calls in a step, `layers` of self-attentions in a call.
    """

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    calls: int = 2
    layers: int = 2
    steps: int = 2
    common: dict[str, Any] = field(default_factory=dict)

    def run(self, pipe: Any, **more: Any) -> torch.Tensor:
        """Latents, so that no time goes to the VAE and no rounding hides a difference."""
        common = {
            "num_inference_steps": self.steps, "height": 16, "width": 16, "num_frames": 9, "prompt": "dance monkey",
            "max_sequence_length": 16, "output_type": "latent", "generator": torch.Generator().manual_seed(0),
        }  # fmt: skip
        arguments = {**common, **self.arguments(), **more}
        pipe.set_progress_bar_config(disable=True)
        return pipe(**{name: value for name, value in arguments.items() if value is not None}).frames


_CFG = {"negative_prompt": "negative", "guidance_scale": 6.0}
_TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
_I2V_TEMPLATE = {
    "template": "{}<image>", "crop_start": 0, "image_emb_start": 1, "image_emb_end": 5, "image_emb_len": 4,
    "double_return_token_id": 30,
}  # fmt: skip

PIPES: dict[str, Pipe] = {
    "wan": Pipe(wan, lambda: _CFG),
    "wan22": Pipe(wan22, lambda: _CFG, steps=4),
    "wan22_5b": Pipe(wan22_5b, lambda: {**_CFG, "height": 32, "width": 32}),
    "wan_i2v": Pipe(wan_i2v, lambda: {**_CFG, "image": image()}),
    "wan_i2v_image_keys": Pipe(lambda: wan_i2v(True), lambda: {**_CFG, "image": image(), "max_sequence_length": 512}),
    "wan22_i2v": Pipe(wan22_i2v, lambda: {**_CFG, "image": image()}, steps=4),
    "wan_v2v": Pipe(
        wan_v2v, lambda: {**_CFG, "video": [image()] * 9, "num_frames": None, "strength": 0.75}, steps=4
    ),
    "wan_vace": Pipe(
        wan_vace, lambda: {**_CFG, "video": [image()] * 9, "mask": [image(mode="L")] * 9, "reference_images": image()},
        layers=5,
    ),
    "hunyuan": Pipe(hunyuan, lambda: {**_TEMPLATE, "guidance_scale": 4.5}, calls=1),
    "hunyuan_true_cfg": Pipe(
        hunyuan, lambda: {**_TEMPLATE, "guidance_scale": 4.5, "negative_prompt": "a", "true_cfg_scale": 2.0}
    ),
    "hunyuan_i2v": Pipe(
        hunyuan_i2v,
        lambda: {
            "image": image(), "prompt_template": _I2V_TEMPLATE, "negative_prompt": "a", "true_cfg_scale": 2.0,
            "guidance_scale": 1.0, "max_sequence_length": 64,
        },
    ),
    "mochi": Pipe(mochi, lambda: {**_CFG, "negative_prompt": "", "num_frames": 7}, calls=1),
}  # fmt: skip


def _wan_inputs(grid: tuple[int, int, int], batch: int, text: list[int]) -> dict[str, torch.Tensor]:
    return {**_latents(16, grid, batch), "encoder_hidden_states": torch.randn(batch, 12, 32)}


def _vace_inputs(grid: tuple[int, int, int], batch: int, text: list[int]) -> dict[str, torch.Tensor]:
    return {**_wan_inputs(grid, batch, text), "control_hidden_states": _latents(96, grid, batch)["hidden_states"]}


def _latents(channels: int, grid: tuple[int, int, int], batch: int) -> dict[str, torch.Tensor]:
    frames, rows, columns = grid
    latents = torch.randn(batch, channels, frames, 2 * rows, 2 * columns)
    return {"hidden_states": latents, "timestep": torch.full((batch,), 500.0)}


def _joint_text(width: int, text: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.zeros(len(text), 12, dtype=torch.int64)
    for row, valid in zip(mask, text, strict=True):
        row[:valid] = 1
    return {"encoder_hidden_states": torch.randn(len(text), 12, width), "encoder_attention_mask": mask}


def _hunyuan_inputs(grid: tuple[int, int, int], batch: int, text: list[int]) -> dict[str, torch.Tensor]:
    more = {"pooled_projections": torch.randn(batch, 8), "guidance": torch.full((batch,), 6000.0)}
    return {**_latents(4, grid, batch), **_joint_text(16, text), **more}


def _mochi_inputs(grid: tuple[int, int, int], batch: int, text: list[int]) -> dict[str, torch.Tensor]:
    return {**_latents(12, grid, batch), **_joint_text(32, text)}


@dataclass(frozen=True)
class Tiny:
    """A tiny transformer of a family.

    `inputs(grid, batch, text)` makes a forward's arguments for a token grid and valid text lengths up to 12.
    """

    family: str
    build: Callable[..., Any]
    inputs: Callable[[tuple[int, int, int], int, list[int]], dict[str, torch.Tensor]]

    def forward(
        self, model: Any, grid: tuple[int, int, int] = (5, 15, 25), text: tuple[int, ...] = (12, 7)
    ) -> torch.Tensor:
        """The output for inputs that are the same every time."""
        torch.manual_seed(1)
        with torch.no_grad():
            return model(**self.inputs(grid, len(text), list(text)), return_dict=False)[0]


TINY: dict[str, Tiny] = {
    "wan": Tiny("wan", wan_transformer, _wan_inputs),
    "wan_vace": Tiny("wan", vace_transformer, _vace_inputs),
    "hunyuan_video": Tiny("hunyuan_video", hunyuan_transformer, _hunyuan_inputs),
    "mochi": Tiny("mochi", mochi_transformer, _mochi_inputs),
}


def assert_as_accurate(ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> None:
    """A transformer's output [B, C, ...] is at most twice as far from the truth as the stock processors'.

    The judge of the kernels, on whole models; see `videosparse/kernels/accuracy.py`.
    """
    from videosparse.kernels.accuracy import allowed_error, worst_row

    ours, stock, truth = (x.detach().movedim(1, -1) for x in (ours, stock, truth))
    assert ours.dtype == stock.dtype
    error, allowed = worst_row(ours, truth), allowed_error(truth.double(), stock)
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture(scope="session")
def built() -> dict[str, Any]:
    """What has been built so far."""
    return {}


@pytest.fixture
def pipe_of(built: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """`pipe_of(name)`: a pipeline of `PIPES`, built once, with stock processors before and after the test."""
    yield from _shared(built, {f"pipe {name}": kind.build for name, kind in PIPES.items()}, "pipe ")


@pytest.fixture
def tiny_of(built: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """`tiny_of(name)`: a transformer of `TINY`, likewise."""
    yield from _shared(built, {f"tiny {name}": tiny.build for name, tiny in TINY.items()}, "tiny ")


def _shared(
    built: dict[str, Any], builders: dict[str, Callable[[], Any]], prefix: str
) -> Iterator[Callable[[str], Any]]:
    from videosparse import restore

    used: list[tuple[Any, set[int]]] = []

    def get(name: str) -> Any:
        key = prefix + name
        if key not in built:
            built[key] = builders[key]()
        used.append((built[key], set(_hooks(built[key]))))
        return built[key]

    yield get
    left = 0
    for model, before in used:
        restore(model)
        for number, hooks in _hooks(model).items():
            if number not in before:  # the tests after this one would run with it
                left += 1
                del hooks[number]
    assert not left, "the test leaves its hooks on a shared model"


def _hooks(model: Any) -> dict[int, dict[int, Any]]:
    """Where each forward hook of the transformers hangs, by its number, which torch gives out once.

    Text encoders of transformers hang up some of their own.
    """
    models = (
        [model] if isinstance(model, torch.nn.Module) else [model.transformer, getattr(model, "transformer_2", None)]
    )
    modules = [module for part in models if part is not None for module in part.modules()]
    places = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return {number: hooks for hooks in places for number in hooks}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise comparisons need one way to add up; tiny models gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
