"""What training has to know of a model family: its loss, its adapters, how it encodes videos and captions.

Shapes: video fp32 [B, 3, F, H, W] in [0, 1]; latents [B, C, T, h, w], normalised as the transformer sees them; noise
level s in (0, 1), x_s = (1 - s) x0 + s eps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videosparse.generation.families import PIPELINE_FAMILIES

Text = dict[str, Tensor]
"""What a transformer reads of captions, by the name of its input: [B, ...] each."""


@dataclass(frozen=True)
class TrainingFamily:
    """The facts of one family.

    Args:
        name: as in `videosparse.models.FAMILIES`.
        draw, shift: of the noise levels in training: Wan's technical report (logit-normal, 3), HunyuanVideo's
            scheduler (7), and Mochi's released trainer (uniform).
        rising: whether time runs from noise (0) to data (1), as in Mochi; the target is x0 - eps then, else eps - x0.
        target: regular expression of the modules that get adapters: q, k, v and o of the video stream's self-attention.
            Plain names would also hit cross-attention, HunyuanVideo's refiner and Mochi's pooler.
        norms: likewise, of the norms of queries and keys.
        read: what the transformer reads of captions, as the family's pipeline makes it; called with the pipeline, the
            captions and the tokens that each is padded to.
    """

    name: str
    draw: str
    shift: float
    rising: bool
    target: str
    norms: str
    read: Callable[[Any, list[str], int], Text]

    @property
    def halves(self) -> bool:
        """Whether its pipeline spaces the steps of a run in two halves, see `RunSchedule`."""
        return PIPELINE_FAMILIES[self.name].halves

    def target_of(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What the transformer is to predict."""
        return latents - noise if self.rising else noise - latents

    def timestep(self, levels: Tensor) -> Tensor:
        """The transformer's time input [B] for noise levels [B]."""
        return 1000.0 * (1 - levels if self.rising else levels)

    def inputs(
        self, transformer_config: Mapping[str, Any], noisy: Tensor, levels: Tensor, text: Text
    ) -> dict[str, Any]:
        """The arguments of the transformer's forward."""
        inputs: dict[str, Any] = {"hidden_states": noisy, "timestep": self.timestep(levels), **text}
        if transformer_config.get("guidance_embeds"):
            # the guidance that was distilled in, times 1000; 1 is none
            inputs["guidance"] = torch.full((len(noisy),), 1000.0, device=noisy.device, dtype=noisy.dtype)
        return inputs

    @torch.no_grad()
    def encode_video(self, vae: Any, video: Tensor) -> Tensor:
        """Latents of a video, without sampling."""
        pixels = (video * 2 - 1).to(vae.device, vae.dtype)
        return self.normalise(vae, vae.encode(pixels).latent_dist.mode().float())

    def normalise(self, vae: Any, latents: Tensor) -> Tensor:
        """As the transformer sees them; the inverse of what the family's pipeline does before decoding."""
        # what a family's VAE does without, its config does not name
        config = vae.config
        scale = float(getattr(config, "scaling_factor", None) or 1.0)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return latents * scale
        shape = (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(x, device=latents.device).view(shape) for x in (mean, std))
        return (latents - mean) * scale / std

    @torch.no_grad()
    def encode_text(self, pipe: Any, captions: Sequence[str], length: int) -> Text:
        """What the transformer reads of captions, as the pipeline makes it, padded to `length` tokens."""
        return self.read(pipe, list(captions), length)


def _read_wan(pipe: Any, captions: list[str], length: int) -> Text:
    embeds, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds}


def _read_hunyuan_video(pipe: Any, captions: list[str], length: int) -> Text:
    embeds, pooled, mask = pipe.encode_prompt(captions, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "encoder_attention_mask": mask}


def _read_mochi(pipe: Any, captions: list[str], length: int) -> Text:
    embeds, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


_OUT = r"(to_q|to_k|to_v|to_out\.0)"

TRAINING_FAMILIES: dict[str, TrainingFamily] = {
    family.name: family
    for family in (
        TrainingFamily(
            "wan", "logit-normal", 3.0, False,
            target=rf"(vace_)?blocks\.\d+\.attn1\.{_OUT}",
            norms=r"(vace_)?blocks\.\d+\.attn1\.norm_[qk]",
            read=_read_wan,
        ),
        TrainingFamily(
            "hunyuan_video", "logit-normal", 7.0, False,
            target=rf"transformer_blocks\.\d+\.attn\.{_OUT}|single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v)",
            norms=r"(single_)?transformer_blocks\.\d+\.attn\.norm_[qk]",
            read=_read_hunyuan_video,
        ),
        TrainingFamily(
            "mochi", "uniform", 1.0, True,
            target=rf"transformer_blocks\.\d+\.attn1\.{_OUT}",
            norms=r"transformer_blocks\.\d+\.attn1\.norm_[qk]",
            read=_read_mochi,
        ),
    )
}  # fmt: skip
