"""HunyuanVideo: video and text attend together, in dual-stream blocks first, then in single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from videosparse.models.base import ModelFamily, Rotary, SelfAttention, join, rotate, split, split_heads, valid_text
from videosparse.policies.base import LayerPlan


class HunyuanVideoFamily(ModelFamily):
    """Text-to-video and both kinds of image-to-video; the text refiner is not touched.

    Image tokens of image-to-video come in among the text tokens.
    """

    name = "hunyuan_video"
    transformers = ("HunyuanVideoTransformer3DModel",)
    stock = ("HunyuanVideoAttnProcessor2_0",)
    variants = ("hunyuan-video",)
    joint = True

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

    def project(
        self, attn: Any, video: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None, plan: LayerPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RMS norm per head; rotary [S, D] holds each angle twice and turns video only.

        Single-stream blocks project both streams with one set of weights: in one call, as the stock processor does,
        so that an offloaded weight travels once.
        """
        assert text is not None  # the transformer always passes it
        single = self._heads(attn, torch.cat([video, text], 1)) if attn.add_q_proj is None else None
        if single is None:
            pairs = list(zip(self._heads(attn, video), self._added(attn, text), strict=True))
        else:
            pairs = [(x[:, : video.shape[1]], x[:, video.shape[1] :]) for x in single]
        if rotary is not None:
            cos, sin = rotary[0][None, :, None, 0::2], rotary[1][None, :, None, 1::2]
            pairs[:2] = [(rotate(x, cos, sin), t) for x, t in pairs[:2]]
        q, k = (join(x, t, plan.layout) for x, t in pairs[:2])
        if single is not None and plan.layout.text_start == plan.layout.video:
            return q, k, single[2]  # no gap: still the one sequence that it was projected as
        return q, k, join(*pairs[2], plan.layout)

    def _heads(self, attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (split_heads(f(x), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        return q, k, v

    def _added(self, attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (split_heads(f(x), attn.heads) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        q = q if attn.norm_added_q is None else attn.norm_added_q(q)
        k = k if attn.norm_added_k is None else attn.norm_added_k(k)
        return q, k, v

    def finish(self, attn: Any, out: torch.Tensor, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """(video [B, V, C], text [B, T, C]); single-stream blocks project the output themselves."""
        video, text = split(out.flatten(2, 3), plan.layout)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text
