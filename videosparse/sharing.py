"""One attention shared by several ranks: what each of them holds of the sequence, and how heads are gathered.

Ulysses: between attentions a rank holds a part of the video tokens; inside one it holds all tokens of a part of the
heads. So a core sees what it sees on one GPU, with fewer heads, and every method works that needs no other head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import _functional_collectives as funcol

from videosparse._diffusers import HostProcessor, Ulysses
from videosparse.kernels import KernelOptions
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models.base import join, ordered, split
from videosparse.policies.base import LayerPlan, Mode, SparsityPolicy


@dataclass(frozen=True)
class Exchange:
    """Moves q, k and v between a part of the tokens with all heads, and all tokens with a part of the heads (Ulysses).

    Args:
        who: the ranks.
    """

    who: Ulysses

    @property
    def ranks(self) -> int:
        """Processes that share the attention."""
        return self.who.ranks

    def shares(self, tokens: int) -> list[int]:
        """Video tokens of each rank, as Diffusers shards them.

        Raises:
            ValueError: they cannot be shared evenly, and Diffusers was not told to do so unevenly.
        """
        base, rest = divmod(tokens, self.ranks)
        if rest and not self.who.uneven:
            raise ValueError(
                f"{tokens} video tokens cannot be shared evenly by {self.ranks} ranks; use another number of frames or "
                "GPUs, or ContextParallelConfig(ulysses_degree=..., ulysses_anything=True)."
            )
        return [base + (rank < rest) for rank in range(self.ranks)]

    def share(self, tokens: int) -> int:
        """Video tokens of this rank."""
        return self.shares(tokens)[self.who.rank]

    def to_heads(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """[B, this rank's tokens, H, D] to [B, tokens, H / ranks, D]."""
        batch, length, heads, width = x.shape
        parts = x.reshape(batch, length, self.ranks, heads // self.ranks, width).permute(2, 1, 0, 3, 4)
        sent = parts.reshape(self.ranks * length, batch, heads // self.ranks, width)
        return self._all_to_all(sent, self.shares(tokens), [length] * self.ranks).permute(1, 0, 2, 3)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[B, tokens, H / ranks, D] to [B, this rank's tokens, H, D]."""
        batch, tokens, heads, width = x.shape
        length = self.share(tokens)
        sent = x.permute(1, 0, 2, 3)
        got = self._all_to_all(sent, [length] * self.ranks, self.shares(tokens))
        parts = got.reshape(self.ranks, length, batch, heads, width).permute(2, 1, 0, 3, 4)
        return parts.reshape(batch, length, self.ranks * heads, width)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the heads of a tensor [B, T, H, D] that every rank holds."""
        return x.chunk(self.ranks, dim=2)[self.who.rank]

    def all_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D], the same on every rank, from each rank's part [B, T, H / ranks, D]."""
        batch, tokens, heads, width = x.shape
        sent = x.expand(self.ranks, *x.shape).reshape(self.ranks * batch, tokens, heads, width)
        got = self._all_to_all(sent, [batch] * self.ranks, [batch] * self.ranks)
        parts = got.reshape(self.ranks, batch, tokens, heads, width).permute(1, 2, 0, 3, 4)
        return parts.reshape(batch, tokens, self.ranks * heads, width)

    def _all_to_all(self, x: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        # with a gradient, which only training asks for
        move = funcol.all_to_all_single_autograd if torch.is_grad_enabled() else funcol.all_to_all_single
        out: torch.Tensor = move(x.contiguous(), received, sent, self.who.group)
        return out


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a sequence that a rank projects, and how it becomes whole sequences of a part of the heads (Ulysses).

    Video tokens are shared by the ranks; text, which is short, is on all of them.

    Args:
        exchange: between the ranks.
        plan: lays out the part: this rank's video tokens, then all text.
    """

    exchange: Exchange
    plan: LayerPlan

    @classmethod
    def of(cls, exchange: Exchange, layout: TokenLayout, options: KernelOptions) -> Shard:
        """The shard of this rank.

        Raises:
            ValueError: the ranks cannot share these tokens.
        """
        part = TokenLayout(VideoGrid(1, 1, exchange.share(layout.video)), layout.text)
        return cls(exchange, LayerPlan(Mode.DENSE, part, options=options))

    def whole(self, x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """[B, plan.layout.length, H / ranks, D] in the plan's order from this part [B, part, H, D]."""
        video, text = split(x, self.plan.layout)
        video = self.exchange.to_heads(video, plan.layout.video)
        if not plan.layout.text:
            return ordered(video, plan)
        return join(video, self.exchange.own_heads(text), plan)

    def part(self, out: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """This part [B, part, H, D] of the output [B, plan.layout.length, H / ranks, D]."""
        video, text = split(out, plan.layout)
        video = self.exchange.to_tokens(video)
        return torch.cat((video, self.exchange.all_heads(text)), 1) if plan.layout.text else video


def shard_of(host: HostProcessor, layout: TokenLayout, options: KernelOptions) -> Shard | None:
    """What this rank holds of a sequence; None where it holds all.

    Raises:
        ValueError: the ranks cannot share these tokens.
    """
    who = host.ulysses()
    return None if who is None else Shard.of(Exchange(who), layout, options)


def check_shared(host: HostProcessor, *, joint: bool, policy: SparsityPolicy | None, heads: int) -> None:
    """Raise where ranks share an attention in a way that does not work.

    Args:
        host: of one self-attention.
        joint: text is part of the sequence.
        policy: the method, None for dense.
        heads: of a self-attention.

    Raises:
        NotImplementedError: ring attention that skips keys or has text, or maps made for all heads.
        ValueError: the ranks cannot share the heads.
    """
    degree = host.ring_degree()
    if degree > 1 and (policy is not None or joint):
        what = "Sparse attention" if policy is not None else "Attention with text in the sequence"
        raise NotImplementedError(
            f"{what} does not work with ring attention (ring_degree={degree}): a rank never sees all keys. Use "
            "videosparse.parallelize(pipe), or ContextParallelConfig(ulysses_degree=...)."
        )
    if policy is not None and policy.by_head and not policy.searches and host.ulysses_degree() > 1:
        raise NotImplementedError(
            "Plans of PAROAttention do not work with context parallelism: every head has its own order and map, and a "
            "rank sees its share of the heads. Use one GPU, PAROProcessor() without a plan, or RadialProcessor()."
        )
    check_heads(heads, host.ulysses_degree())


def check_heads(heads: int, ranks: int) -> None:
    """Raise ValueError unless so many ranks can share the heads of an attention."""
    if heads % ranks:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{heads} attention heads cannot be shared by {ranks} ranks (ulysses_degree={ranks}); use one of "
            f"{fitting}, or one GPU for each video."
        )
