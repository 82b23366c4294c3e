"""What a model family is: how its transformers lay out tokens, where they attend to themselves, and with what."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers.models.normalization import MochiRMSNorm, RMSNorm

from videosparse.kernels import KernelOptions, Stream, norm_rotate, reorder
from videosparse.kernels.backend import TRITON_DTYPES, interpreted, missing
from videosparse.kernels.norm_op import MAX_WIDTH, row_width
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models.rope import TemporalRotary
from videosparse.policies.base import LayerPlan

logger = logging.getLogger(__name__)

Rotary = tuple[torch.Tensor, torch.Tensor]

NORMS = (torch.nn.RMSNorm, RMSNorm, MochiRMSNorm)
"""What `norm_rotate` computes; these classes differ in where they round on the way."""

# made once: this is a path that every layer of every step takes
_FORCED, _FREE = KernelOptions(backend="triton"), KernelOptions()


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
        stride: pixel frames in one latent frame, after the first.
        rotary_dims: of joint families: dimensions of the (cos, sin) that their `rope` returns, tokens first.
    """

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]
    stock: ClassVar[tuple[str, ...]]
    variants: ClassVar[tuple[str, ...]]
    joint: ClassVar[bool]
    stride: ClassVar[int]
    rotary_dims: ClassVar[int]

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

        Video tokens come in `plan.order`.

        Args:
            attn: the attention module.
            video: [B, V, C] hidden states of the video tokens.
            text: [B, T, C'] hidden states of the text tokens, None for families whose self-attention has none.
            rotary: (cos, sin) as the transformer makes them.
            plan: where text starts, and the token order.
        """

    @abstractmethod
    def finish(self, attn: Any, out: torch.Tensor, plan: LayerPlan) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What the attention module returns, from the attention output [B, plan.layout.length, H, D].

        The output is in raster order, whatever the order of q, k and v.
        """

    def variant(self, config: Mapping[str, Any], experts: int) -> str:
        """Which of `variants` a transformer's configuration describes; `experts` transformers share its run."""
        return self.variants[0]

    @abstractmethod
    def temporal_rotary(self, transformer: Any) -> TemporalRotary:
        """Where and how the rotary embedding turns along time.

        Raises:
            ValueError: the model learned its frequencies, which no formula stretches.
        """

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

    The mask is read as a length: both families' pipelines pad behind the text, so valid tokens come first. A mask with
    holes, which Mochi's transformer alone would take, is not told apart from one without.
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


def ordered(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """x [B, plan.layout.length, H, D] in the token order of a plan; as it is where there is none."""
    return x if plan.order is None else reorder(x, plan.order, plan.layout, options=plan.options)


def join(video: torch.Tensor, text: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """[B, plan.layout.length, H, D] from [B, V, H, D] and [B, T, H, D], zeros in the gap, video in the plan's order.

    Kernels mask the gap; zeros rather than uninitialised memory keep NaN out of checks for NaN.
    """
    layout = plan.layout
    if plan.order is not None:  # one copy for both
        return reorder(video, plan.order, layout, text=text, options=plan.options)
    gap = layout.text_start - layout.video
    parts = [video, text] if gap == 0 else [video, video.new_zeros(video.shape[0], gap, *video.shape[2:]), text]
    return torch.cat(parts, 1)


def split(out: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `join`: views [B, V, ...] and [B, T, ...]."""
    return out[:, : layout.video], out[:, layout.text_start : layout.text_start + layout.text]


@dataclass(frozen=True, eq=False)
class Projected:
    """Queries and keys [B, S, H * D] of one stream as projected, and the modules that norm them; None does not."""

    q: torch.Tensor
    k: torch.Tensor
    norm_q: Any
    norm_k: Any


def norm_fused(
    video: Projected, text: Projected | None, rotary: Rotary | None, heads: int, plan: LayerPlan
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """q and k [B, L, H, D] as `project` returns them, by one kernel; None where they are to be made step by step.

    "auto" does so on a GPU, in compiled models too: there the one kernel takes a half to a quarter of the time of the
    steps as torch.compile fuses them (assets/results/norm_rotate.csv). In eager mode it says once why it does not run.

    Args:
        video: of the video tokens.
        text: of the text tokens, for joint families.
        rotary: cos and sin that broadcast to [B, S, H, D / 2], one for each pair.
        heads: H.
        plan: where text starts, the token order, and `options.fused_norm`.

    Raises:
        RuntimeError: options.fused_norm is "on" and something is in the way.
    """
    options = plan.options
    if options.fused_norm == "off":
        return None
    forced, compiling = options.fused_norm == "on", torch.compiler.is_compiling()
    if not forced and (options.backend == "torch" or (compiling and video.q.device.type != "cuda")):
        return None
    reason = _unfusable(video, text, rotary, heads, forced)
    if reason is not None:
        if forced:
            raise RuntimeError(f'fused_norm="on" cannot run here: {reason}. Use fused_norm="auto" or "off".')
        if not compiling:
            _say_once(reason)
        return None
    if rotary is not None:
        cos, sin = (x[0] if x.dim() == 4 else x for x in rotary)
        rotary = cos, sin
    text_start = None if text is None else plan.layout.text_start
    return norm_rotate(
        _stream(video), None if text is None else _stream(text), heads=heads, rotary=rotary, text_start=text_start,
        order=plan.order, options=_FORCED if forced else _FREE,
    )  # fmt: skip


def _unfusable(video: Projected, text: Projected | None, rotary: Rotary | None, heads: int, forced: bool) -> str | None:
    """What keeps `norm_rotate` from standing in for the steps; None when nothing does."""
    x, streams = video.q, [video] if text is None else [video, text]
    # a compiled graph does not ask: the op finds out when it runs
    asks = not torch.compiler.is_compiling() and not (forced and x.device.type == "cpu" and interpreted())
    if asks and (reason := missing(x.device, x.dtype)):
        return reason
    if row_width(heads, x.shape[2] // heads) > MAX_WIDTH:
        return f"{heads} heads of {x.shape[2] // heads} are wider than {MAX_WIDTH}"
    named = [(name, getattr(s, name), getattr(s, f"norm_{name}")) for s in streams for name in ("q", "k")]
    for name, projected, norm in named:
        if reason := _unfusable_norm(projected, norm, heads):
            return f"norm_{name} {reason}"
        if type(projected) is not torch.Tensor or projected.dtype != x.dtype or projected.stride(2) != 1:
            return f"{name} is no plain tensor of {x.dtype}, contiguous along its last dimension"
    if any(s.norm_q.eps != s.norm_k.eps or s.norm_q.weight.shape != s.norm_k.weight.shape for s in streams):
        return "norm_q and norm_k differ in eps or size"
    if any(y.device != x.device or y.dtype not in TRITON_DTYPES for y in rotary or ()):
        return f"the rotary embedding is not on {x.device}, or in double precision"
    leaves = [*(rotary or ()), *(p for _, p, _ in named), *(norm.weight for _, _, norm in named)]
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        return "it has no gradient, and one is needed"
    return None


def _unfusable_norm(x: torch.Tensor, norm: Any, heads: int) -> str | None:
    """What keeps `norm_rotate` from doing what `norm` does to x [B, S, H * D]; None when nothing does."""
    if type(norm) not in NORMS:
        return f"is a {type(norm).__name__}"
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return "has hooks, as offloading sets them"
    weight = norm.weight
    if weight is None or getattr(norm, "bias", None) is not None or not norm.eps:
        return "lacks a weight or an eps, or has a bias"
    if type(weight) not in (torch.nn.Parameter, torch.Tensor) or weight.device != x.device:
        return f"has its weight elsewhere than on {x.device}"
    if tuple(weight.shape) not in ((x.shape[2],), (x.shape[2] // heads,)):
        return f"has a weight of shape {list(weight.shape)}"
    mixed = weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    if mixed or weight.dtype not in TRITON_DTYPES:
        return f"has a weight of {weight.dtype} for {x.dtype}"
    return None


def _stream(x: Projected) -> Stream:
    return Stream(x.q, x.k, x.norm_q.weight, x.norm_k.weight, x.norm_q.eps)


@cache
def _say_once(reason: str) -> None:
    logger.info("Queries and keys are normed and rotated step by step: %s.", reason)
