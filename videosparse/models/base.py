"""What a model family is: how its transformers lay out tokens, where they attend to themselves, and with what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.base import LayerPlan

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """One self-attention of a transformer.

    Args:
        name: path of the module in its transformer.
        module: the attention module; it owns projections and norms.
        depth: position along the depth of the network, from 0. Blocks that run side by side share a depth.
    """

    name: str
    module: torch.nn.Module
    depth: int


class ModelFamily(ABC):
    """The transformers that share a way of attending; knows no method, keeps no state.

    A new family is one file with a subclass, and one line in `videosparse.models.FAMILIES`.

    Attributes:
        name: how `ModelSpec.family` calls it.
        transformers: class names of the transformers in Diffusers.
        stock: class names of the attention processors that these ship with.
        variants: published models that differ in what suits them, the plainest first.
        joint: whether text tokens take part in the self-attention.
    """

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]
    stock: ClassVar[tuple[str, ...]]
    variants: ClassVar[tuple[str, ...]]
    joint: ClassVar[bool]

    @abstractmethod
    def patch(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(frames, rows, columns) of latents in one token."""

    @abstractmethod
    def attentions(self, transformer: torch.nn.Module) -> list[SelfAttention]:
        """The self-attentions over video tokens, in depth order; neither text refiners nor cross-attention."""

    @abstractmethod
    def project(
        self, attn: Any, video: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None, plan: LayerPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v [B, plan.layout.length, H, D] from hidden states, normed and rotated: video, gap, then text.

        Args:
            attn: the attention module.
            video: [B, V, C] hidden states of the video tokens.
            text: [B, T, C'] hidden states of the text tokens, None for families whose self-attention has none.
            rotary: (cos, sin) as the transformer makes them.
            plan: where text starts.
        """

    @abstractmethod
    def finish(self, attn: Any, out: torch.Tensor, plan: LayerPlan) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What the attention module returns, from the attention output [B, plan.layout.length, H, D]."""

    def variant(self, config: Mapping[str, Any], experts: int) -> str:
        """Which of `variants` a transformer's configuration describes; `experts` transformers share its run."""
        return self.variants[0]

    def text(self, inputs: Mapping[str, Any]) -> tuple[int, torch.Tensor | None]:
        """(text tokens in self-attention with padding, int32 [B] valid ones) from the root's inputs."""
        return 0, None

    def layout(self, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> TokenLayout:
        """The sequence of one forward, without a gap.

        Args:
            config: the transformer's configuration.
            inputs: the root's inputs by name; `hidden_states` are latents [B, C, F, H, W].

        Raises:
            ValueError: latents of another rank.
        """
        latents = inputs["hidden_states"]
        if latents.dim() != 5:
            raise ValueError(
                f"hidden_states must be [batch, channels, frames, height, width] (got {list(latents.shape)}); "
                "latents of one image become a video of one frame by latents.unsqueeze(2)."
            )
        sizes = (int(n) // p for n, p in zip(latents.shape[2:], self.patch(config), strict=True))
        grid = VideoGrid(*sizes)
        text, valid = self.text(inputs)
        return TokenLayout(grid, text, seq_lens=None if valid is None else valid.to(latents.device) + grid.tokens)


def valid_text(inputs: Mapping[str, Any]) -> tuple[int, torch.Tensor]:
    """(padded, int32 [B] valid) text tokens from `encoder_hidden_states` [B, T, C] and `encoder_attention_mask` [B, T].

    The mask is read as a length, as both joint families do: valid tokens come first.
    """
    text = int(inputs["encoder_hidden_states"].shape[1])
    return text, inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, H * D] to [B, L, H, D]."""
    return x.reshape(*x.shape[:2], heads, -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of x [B, S, H, D] by angles whose cos and sin broadcast to
    [B, S, H, D/2].

    Computed in the wider of the two dtypes, rounded once to that of x.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def join(video: torch.Tensor, text: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """[B, layout.length, ...] from [B, V, ...] and [B, T, ...], zeros in the gap.

    Kernels mask the gap; zeros rather than uninitialised memory keep NaN out of checks for NaN.
    """
    gap = layout.text_start - layout.video
    parts = [video, text] if gap == 0 else [video, video.new_zeros(video.shape[0], gap, *video.shape[2:]), text]
    return torch.cat(parts, 1)


def split(out: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `join`: views [B, V, ...] and [B, T, ...]."""
    return out[:, : layout.video], out[:, layout.text_start : layout.text_start + layout.text]
