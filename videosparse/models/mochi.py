"""Mochi: video and text attend together, padded text neither reads nor is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from videosparse.models.base import (
    ModelFamily,
    Projected,
    Rotary,
    SelfAttention,
    join,
    norm_fused,
    rotate,
    split,
    split_heads,
    valid_text,
)
from videosparse.models.rope import TemporalRotary
from videosparse.policies.base import LayerPlan


class MochiFamily(ModelFamily):
    """Text-to-video. Negative and positive prompt share a batch, and the negative one may have no valid text at all."""

    name = "mochi"
    transformers = ("MochiTransformer3DModel",)
    stock = ("MochiAttnProcessor2_0",)
    variants = ("mochi",)
    joint = True
    stride = 6
    rotary_dims = 3

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(1, 2, 2) in the published model."""
        return 1, config["patch_size"], config["patch_size"]

    def text(self, inputs: Mapping[str, Any]) -> tuple[int, torch.Tensor | None]:
        """As given: nothing changes the number of text tokens before the blocks."""
        return valid_text(inputs)

    def attentions(self, transformer: Any) -> list[SelfAttention]:
        """`transformer_blocks.*.attn1`."""
        blocks = enumerate(transformer.transformer_blocks)
        return [SelfAttention(f"transformer_blocks.{i}.attn1", block.attn1, i) for i, block in blocks]

    def temporal_rotary(self, transformer: Any) -> TemporalRotary:
        """Always raises ValueError."""
        raise ValueError(
            "Mochi learned the frequencies of its rotary embedding, and they mix time and space: there is no temporal "
            "frequency to stretch. Use rope none, or train a LoRA at the longer length."
        )

    def project(
        self, attn: Any, video: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None, plan: LayerPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RMS norm per head; rotary [S, H, D/2] is learned per head and turns video only."""
        q, k, v = attn.to_q(video), attn.to_k(video), attn.to_v(video)
        eq, ek, ev = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        v = join(split_heads(v, attn.heads), split_heads(ev, attn.heads), plan)
        fused = norm_fused(
            Projected(q, k, attn.norm_q, attn.norm_k),
            Projected(eq, ek, attn.norm_added_q, attn.norm_added_k),
            rotary,
            attn.heads,
            plan,
        )
        if fused is not None:
            return *fused, v
        q, k, eq, ek = (split_heads(x, attn.heads) for x in (q, k, eq, ek))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        eq = eq if attn.norm_added_q is None else attn.norm_added_q(eq)
        ek = ek if attn.norm_added_k is None else attn.norm_added_k(ek)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return join(q, eq, plan), join(k, ek, plan), v

    def finish(self, attn: Any, out: torch.Tensor, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """(video [B, V, C], text [B, T, C']); the last block drops its text.

        Differs from the stock processor in that padded text need not come out as 0: nobody reads it.
        """
        video, text = split(out.flatten(2, 3), plan.layout)
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text
