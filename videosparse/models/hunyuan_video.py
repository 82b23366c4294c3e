"""HunyuanVideo: video and text attend together, in dual-stream blocks first, then in single-stream blocks."""

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

# By temporal columns: 16 in the published models, which repeat from 50 latent frames on (RIFLEx, arXiv 2502.15894).
_INTRINSIC = {16: 4}


class HunyuanVideoFamily(ModelFamily):
    """Text-to-video and both kinds of image-to-video; the text refiner is not touched.

    Image tokens of image-to-video come in among the text tokens.
    """

    name = "hunyuan_video"
    transformers = ("HunyuanVideoTransformer3DModel",)
    stock = ("HunyuanVideoAttnProcessor2_0",)
    variants = ("hunyuan-video",)
    joint = True
    stride = 4
    rotary_dims = 2

    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(1, 2, 2) in every published model."""
        return config["patch_size_t"], config["patch_size"], config["patch_size"]

    def text(self, inputs: Mapping[str, Any]) -> tuple[int, torch.Tensor | None]:
        """The refiner keeps the number of text tokens."""
        return valid_text(inputs)

    def attentions(self, transformer: Any) -> list[SelfAttention]:
        """`transformer_blocks.*.attn` (dual), then `single_transformer_blocks.*.attn`."""
        found: list[SelfAttention] = []
        for stack in ("transformer_blocks", "single_transformer_blocks"):
            for i, block in enumerate(getattr(transformer, stack)):
                found.append(SelfAttention(f"{stack}.{i}.attn", block.attn, len(found)))
        return found

    def temporal_rotary(self, transformer: Any) -> TemporalRotary:
        """Base 256 in the published models."""
        rope = transformer.rope
        dim = rope.rope_dim[0]
        return TemporalRotary(rope, dim, float(rope.theta), rope.patch_size_t, self.stride, _INTRINSIC.get(dim))

    def project(
        self, attn: Any, video: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None, plan: LayerPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RMS norm per head; rotary [S, D] holds each angle twice and turns video only.

        Single-stream blocks project both streams with one set of weights: in one call, as the stock processor does,
        so that an offloaded weight travels once.
        """
        assert text is not None  # the transformer always passes it
        turns = None if rotary is None else (rotary[0][None, :, None, 0::2], rotary[1][None, :, None, 1::2])
        if attn.add_q_proj is None:
            return self._single(attn, torch.cat([video, text], 1), turns, plan)
        q, k, v = attn.to_q(video), attn.to_k(video), attn.to_v(video)
        tq, tk, tv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        v = join(split_heads(v, attn.heads), split_heads(tv, attn.heads), plan)
        fused = norm_fused(
            Projected(q, k, attn.norm_q, attn.norm_k),
            Projected(tq, tk, attn.norm_added_q, attn.norm_added_k),
            turns,
            attn.heads,
            plan,
        )
        if fused is not None:
            return *fused, v
        q, k = self._normed(q, attn.norm_q, attn.heads), self._normed(k, attn.norm_k, attn.heads)
        tq, tk = self._normed(tq, attn.norm_added_q, attn.heads), self._normed(tk, attn.norm_added_k, attn.heads)
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        return join(q, tq, plan), join(k, tk, plan), v

    def _single(
        self, attn: Any, x: torch.Tensor, turns: Rotary | None, plan: LayerPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same from one sequence [B, V + T, C], video then text."""
        layout = plan.layout
        q, k, v = attn.to_q(x), attn.to_k(x), split_heads(attn.to_v(x), attn.heads)
        # without a gap and an order it still is the one sequence that it was projected as
        if layout.text_start != layout.video or plan.order is not None:
            v = join(v[:, : layout.video], v[:, layout.video :], plan)
        fused = norm_fused(
            Projected(q[:, : layout.video], k[:, : layout.video], attn.norm_q, attn.norm_k),
            Projected(q[:, layout.video :], k[:, layout.video :], attn.norm_q, attn.norm_k),
            turns,
            attn.heads,
            plan,
        )
        if fused is not None:
            return *fused, v
        q, k = self._normed(q, attn.norm_q, attn.heads), self._normed(k, attn.norm_k, attn.heads)
        pairs = [(y[:, : layout.video], y[:, layout.video :]) for y in (q, k)]
        if turns is not None:
            pairs = [(rotate(y, *turns), t) for y, t in pairs]
        q, k = (join(y, t, plan) for y, t in pairs)
        return q, k, v

    def _normed(self, x: torch.Tensor, norm: Any, heads: int) -> torch.Tensor:
        x = split_heads(x, heads)
        return x if norm is None else norm(x)

    def finish(self, attn: Any, out: torch.Tensor, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """(video [B, V, C], text [B, T, C]); single-stream blocks project the output themselves."""
        video, text = split(out.flatten(2, 3), plan.layout)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text
