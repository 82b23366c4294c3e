"""Wan 2.1 and 2.2, VACE included: video tokens only; text comes in through cross-attention, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from videosparse.models.base import (
    ModelFamily,
    Projected,
    Rotary,
    SelfAttention,
    norm_fused,
    ordered,
    rotate,
    split_heads,
)
from videosparse.models.rope import TemporalRotary
from videosparse.policies.base import LayerPlan

# By temporal columns: 44 in every published model, where users see videos repeat from 51 latent frames on; 24 in the
# embedded one.
_INTRINSIC = {44: 6, 24: 3}


class WanFamily(ModelFamily):
    """Text-to-video, image-to-video, video-to-video, both experts of 2.2, TI2V-5B and VACE.

    Leading image or reference latents are frames like any other: they are part of `hidden_states`.
    """

    name = "wan"
    transformers = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    stock = ("WanAttnProcessor",)
    variants = ("wan2.1", "wan2.2-a14b", "wan2.2-5b")
    joint = False
    stride = 4

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """As configured, (1, 2, 2) in every published model."""
        frames, rows, columns = config["patch_size"]
        return frames, rows, columns

    def variant(self, config: Mapping[str, Any], experts: int) -> str:
        """2.2-5B has 48 latent channels; 2.2-A14B differs from 2.1-14B only in having two experts."""
        if config.get("in_channels") == 48:
            return "wan2.2-5b"
        return "wan2.2-a14b" if experts > 1 else "wan2.1"

    def attentions(self, transformer: Any) -> list[SelfAttention]:
        """`blocks.*.attn1`, then VACE's `vace_blocks.*.attn1`, which have the depth of the block they hint at."""
        found = [SelfAttention(f"blocks.{i}.attn1", block.attn1, i) for i, block in enumerate(transformer.blocks)]
        control = getattr(transformer, "vace_blocks", None)
        if control is not None:
            depths = transformer.config.vace_layers
            found += [
                SelfAttention(f"vace_blocks.{i}.attn1", block.attn1, depth)
                for i, (block, depth) in enumerate(zip(control, depths, strict=True))
            ]
        return found

    def temporal_rotary(self, transformer: Any) -> TemporalRotary:
        """Base 10,000; what the heights and widths of a token leave of a head turns along time."""
        rope = transformer.rope
        return TemporalRotary(rope, rope.t_dim, 10000.0, rope.patch_size[0], self.stride, _INTRINSIC.get(rope.t_dim))

    def project(
        self, attn: Any, video: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None, plan: LayerPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RMS norm across all heads, before they are split; rotary [1, S, 1, D] holds each angle twice."""
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(video).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(video), attn.to_k(video), attn.to_v(video)
        v = ordered(split_heads(v, attn.heads), plan)
        turns = None if rotary is None else (rotary[0][..., 0::2], rotary[1][..., 1::2])
        fused = norm_fused(Projected(q, k, attn.norm_q, attn.norm_k), None, turns, attn.heads, plan)
        if fused is not None:
            return *fused, v
        q, k = split_heads(attn.norm_q(q), attn.heads), split_heads(attn.norm_k(k), attn.heads)
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        return ordered(q, plan), ordered(k, plan), v

    def finish(self, attn: Any, out: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """Output projection and dropout: [B, V, C]."""
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))  # type: ignore[no-any-return]
