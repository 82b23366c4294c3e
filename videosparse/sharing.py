"""One attention shared by several ranks: what each of them holds of the sequence, and how heads are gathered.

Ulysses: between attentions a rank holds a part of the video tokens; inside one it holds all tokens of a part of the
heads. So a core sees what it sees on one GPU, with fewer heads, and every method works that needs no other head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed import _functional_collectives as funcol

from videosparse._diffusers import HostProcessor, Ulysses
from videosparse.blocks import PackedIndex, work_order
from videosparse.kernels import KernelOptions
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.models.base import join, ordered, split
from videosparse.ordering import TokenOrder
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


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: funcol.AsyncCollectiveTensor) -> torch.Tensor:
        here: torch.Tensor = x.trigger_wait()  # type: ignore[no-untyped-call]
        return here.detach()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def arrived(x: torch.Tensor) -> torch.Tensor:
    """An exchanged tensor as a plain one, without a copy; the stream waits until it is here.

    What PyTorch gives before that is a wrapper, which its own operations wait for. A kernel of another library that is
    handed one (FlashAttention-4 is) reads its pointer, which is null.
    """
    if not isinstance(x, funcol.AsyncCollectiveTensor):
        return x
    out: torch.Tensor = _Arrived.apply(x)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a sequence that a rank projects, and how it becomes whole sequences of a part of the heads (Ulysses).

    Video tokens are shared by the ranks; text, which is short, is on all of them.

    Args:
        exchange: between the ranks.
        plan: lays out the part: this rank's video tokens, then all text.
        dealt: int64 [H], all heads in the order in which the ranks take them; None is as numbered.
    """

    exchange: Exchange
    plan: LayerPlan
    dealt: torch.Tensor | None = None

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
        x = x if self.dealt is None else x.index_select(2, self.dealt)
        video, text = split(x, self.plan.layout)
        video = self.exchange.to_heads(video, plan.layout.video)
        if not plan.layout.text:
            return ordered(video, plan)
        return join(video, self.exchange.own_heads(text), plan)

    def part(self, out: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """This part [B, part, H, D] of the output [B, plan.layout.length, H / ranks, D]."""
        video, text = split(out, plan.layout)
        video = self.exchange.to_tokens(video)
        whole = torch.cat((video, self.exchange.all_heads(text)), 1) if plan.layout.text else video
        return whole if self.dealt is None else whole.index_select(2, self.dealt.argsort())

    def deal(self, index: PackedIndex, order: TokenOrder) -> tuple[PackedIndex, TokenOrder, Shard]:
        """This rank's part of maps and token orders that were made for all heads, so that ranks have equal work.

        Waits for the device: a plan's maps change a few times in a run.

        Args:
            index: [samples, H, rows, columns].
            order: of H heads.
        """
        samples, heads, rows, columns = index.shape
        counts = index.row_ptr.diff().view(samples, heads, rows)
        dealt = deal_heads(counts.sum((0, 2)).tolist(), self.exchange.ranks)
        size = heads // self.exchange.ranks
        own = dealt[self.exchange.who.rank * size :][:size]
        picked = torch.tensor(own, device=counts.device)
        kept = counts.index_select(1, picked).flatten().long()
        part = PackedIndex(
            index.bits.index_select(1, picked), torch.nn.functional.pad(kept.cumsum(0), (1, 0)).int(), work_order(kept),
            int(kept.sum()), (samples, size, rows, columns), index.block, index.q_len, index.kv_len,
        )  # fmt: skip
        codes = tuple(order.codes[head] for head in own)
        return part, TokenOrder(order.grid, codes), replace(self, dealt=torch.tensor(dealt, device=counts.device))


def deal_heads(work: Sequence[int], ranks: int) -> list[int]:
    """Heads in the order in which ranks take them, each as many: those of rank 0, then those of rank 1, and so on.

    Greedy: the heads with most work come first, each to the rank that has least and still has room. The numbers of one
    rank's heads ascend.
    """
    size = len(work) // ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(work)), key=lambda head: -work[head]):
        open_hands = (hand for hand in hands if len(hand) < size)
        min(open_hands, key=lambda hand: sum(work[h] for h in hand)).append(head)
    return [head for hand in hands for head in sorted(hand)]


def shard_of(host: HostProcessor, layout: TokenLayout, options: KernelOptions) -> Shard | None:
    """What this rank holds of a sequence; None where it holds all.

    Raises:
        ValueError: the ranks cannot share these tokens.
    """
    who = host.ulysses()
    return None if who is None else Shard.of(Exchange(who), layout, options)


def check_shared(
    host: HostProcessor, *, joint: bool, policy: SparsityPolicy | None, heads: int, training: bool = False
) -> None:
    """Raise where ranks share an attention in a way that does not work.

    Args:
        host: of one self-attention.
        joint: text is part of the sequence.
        policy: the method, None for dense.
        heads: of a self-attention.
        training: whether gradients are needed.

    Raises:
        NotImplementedError: ring attention that skips keys or has text; a method that cannot plan for some heads.
        ValueError: the ranks cannot share the heads.
    """
    degree = host.ring_degree()
    if degree > 1 and (policy is not None or joint):
        what = "Sparse attention" if policy is not None else "Attention with text in the sequence"
        raise NotImplementedError(
            f"{what} does not work with ring attention (ring_degree={degree}): a rank never sees all keys. Use "
            "videosparse.parallelize(pipe), or ContextParallelConfig(ulysses_degree=...)."
        )
    if policy is not None and host.ulysses_degree() > 1:
        policy.check_ranks(training=training)
    check_heads(heads, host.ulysses_degree())


def check_heads(heads: int, ranks: int) -> None:
    """Raise ValueError unless so many ranks can share the heads of an attention."""
    if heads % ranks:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{heads} attention heads cannot be shared by {ranks} ranks (ulysses_degree={ranks}); use one of "
            f"{fitting}, or one GPU for each video."
        )
