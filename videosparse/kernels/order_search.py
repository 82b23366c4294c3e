"""Choosing token orders and maps by what attention looks like in every order (PAROAttention, arXiv 2506.16054).

By the paper, an order is good where many blocks hold next to nothing, and where the entries of a block are alike.
`look` measures both in each of the six orders of the axes, and `choose` weighs them. The other way, ours, asks for what
a map is to do: `holdings` measures how much of the attention lies in the blocks that it would keep in each order. The
op behind `search_orders` writes the choice and the map that goes with it on the device, for methods that search while a
video is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from videosparse.blocks import PackedIndex
from videosparse.kernels import selection
from videosparse.kernels.ops import block_sums
from videosparse.kernels.options import KernelOptions, own_backend
from videosparse.kernels.reorder_op import reorder
from videosparse.kernels.stats import BlockStats, block_stats
from videosparse.layout import TokenLayout, VideoGrid, ceil_div
from videosparse.logits import FarLogits, arguments
from videosparse.ordering import AXIS_ORDERS, SearchedOrder, TokenOrder

ORDERS = tuple(range(len(AXIS_ORDERS)))

ORDER_BY = ("metric", "mass")
"""Ways of choosing an order: by the paper's metric, or by the attention mass that a map of the asked density keeps."""

UNIT = (64, 64)
"""Blocks in which orders are judged, as published; sums of larger blocks are added up from them."""

# Heads are looked at in groups whose blocks number about this many, so that temporaries stay below a gigabyte.
_GROUP_BLOCKS = 2**24


@dataclass(frozen=True)
class OrderMetric:
    """How a token order is judged: by the paper's M_sparse and M_quant, or by mass.

    Args:
        alpha: weight of sparsity against evenness, 0..1. Not published; .5 is ours.
        eps: probabilities below it count as nothing. Published: 1e-3.
        sigma: share of such entries from which on a block counts as empty. Published: .9.
        by: one of `ORDER_BY`; "mass" reads none of the others.

    Raises:
        TypeError, ValueError: a value of another type, or out of range.
    """

    alpha: float = 0.5
    eps: float = 1e-3
    sigma: float = 0.9
    by: str = "metric"

    def __post_init__(self) -> None:
        if self.by not in ORDER_BY:
            raise ValueError(f"order_by must be {' or '.join(ORDER_BY)} (got {self.by!r}).")
        for name in ("alpha", "eps", "sigma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number (got {value!r}).")
            if not 0 <= value <= 1 or (value == 0 and name != "alpha"):
                raise ValueError(f"{name} must lie in 0..1{'' if name == 'alpha' else ', 0 excluded'} (got {value}).")


@dataclass(frozen=True)
class OrderSelection:
    """What a search for orders writes: sizes that the host knows, the same for every layer of a run.

    Args:
        grid: of the video.
        counts: how many blocks a row keeps; all heads alike.
        metric: how orders are judged.
        choose: whether orders are searched for; else those that the codes hold are kept, and only the map is new.
    """

    grid: VideoGrid
    counts: selection.Selection
    metric: OrderMetric
    choose: bool = True

    def densities(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """See `Selection.densities`."""
        return self.counts.densities(shape)


@dataclass(frozen=True, eq=False)
class Look:
    """What some heads look like in one order.

    Args:
        heads: which ones.
        code: of the order.
        sparse: fp32 [B, h], share of the blocks that count as empty (M_sparse).
        uneven: fp32 [B, h], mean over blocks of their largest entry over their mean (M_quant); 1 in a block of zeros.
        sums: fp32 [B, h, Mq, Nk], the mass of every block of the size that was asked for.
    """

    heads: slice
    code: int
    sparse: torch.Tensor
    uneven: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True, eq=False)
class Holding:
    """What a map would hold of some heads' attention in one order.

    Args:
        heads: which ones.
        code: of the order.
        share: fp32 [B, h], mass of the largest blocks of every row over that of all video blocks; NaN where all is 0.
        sums: fp32 [B, h, Mq, Nk], the mass of every block.
    """

    heads: slice
    code: int
    share: torch.Tensor
    sums: torch.Tensor


def look(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    grid: VideoGrid,
    block: tuple[int, int],
    *,
    orders: Sequence[int] = ORDERS,
    metric: OrderMetric = OrderMetric(),  # frozen, so one instance serves every call
    scale: float | None = None,
    options: KernelOptions = KernelOptions(),  # noqa: B008  the same
) -> Iterator[list[Look]]:
    """Video-to-video attention in several orders, a group of heads at a time.

    Args:
        q, k: [B, L, H, D] in raster order; only the video, [0, grid.tokens), is read.
        lse: float32 [B, H, L] over all keys, text included.
        grid: of the video.
        block: (query rows, key rows) of the sums.
        orders: which ones.
        metric, scale, options: see `OrderMetric` and `block_stats`.

    Yields:
        For each group of heads one `Look` per order.
    """
    for part, own in _groups(q, k, lse, grid):
        yield [_look(*own, grid, block, part, code, metric, scale, options) for code in orders]


def holdings(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    grid: VideoGrid,
    block: tuple[int, int],
    count: int,
    *,
    scale: float | None = None,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> Iterator[Holding]:
    """What the `count` largest blocks of every row hold in each of the six orders.

    Each takes one call of `block_sums` and one of the selection that makes maps, for each group of heads.

    Args:
        q, k, lse, grid, scale, options: see `look`; options.logit as in the call that lse comes from.
        block: (query rows, key rows) of the map.
        count: video columns that each of its rows keeps.

    Yields:
        For each group of heads all orders, raster order first.
    """
    for part, code, sums in sums_by_order(q, k, lse, grid, block, scale=scale, options=options):
        counts = torch.full(sums.shape[:2], count, dtype=torch.int32, device=sums.device)
        rows, columns = sums.shape[2:]
        bits = torch.empty(*sums.shape[:3], ceil_div(columns, 8), dtype=torch.uint8, device=sums.device)
        kept = selection.kernels_for(options.backend, sums).keep_largest(sums, counts, bits, rows, columns)
        yield Holding(part, code, kept.sum(2) / sums.sum((2, 3)), sums)


def sums_by_order(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    grid: VideoGrid,
    block: tuple[int, int],
    *,
    scale: float | None = None,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """The mass of every video block in each of the six orders; for the arguments see `holdings`.

    One order comes after another, so that the sums of six never exist at once.

    Yields:
        For each group of heads all orders, raster order first: which heads, code, and fp32 [B, h, Mq, Nk].
    """
    for part, own in _groups(q, k, lse, grid):
        for code in ORDERS:
            yield part, code, _sums_of(*own, grid, code, block, scale, options)


def _groups(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, grid: VideoGrid
) -> Iterator[tuple[slice, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """(heads, the video of q, k and lse of these) of each group of heads that is looked at together."""
    video, heads = grid.tokens, q.shape[2]
    blocks = q.shape[0] * ceil_div(video, UNIT[0]) * ceil_div(video, UNIT[1])
    size = max(1, min(heads, _GROUP_BLOCKS // blocks))
    for start in range(0, heads, size):
        part = slice(start, min(heads, start + size))
        yield part, (q[:, :video, part], k[:, :video, part], lse[:, part, :video])


def _sums_of(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    grid: VideoGrid,
    code: int,
    block: tuple[int, int],
    scale: float | None,
    options: KernelOptions,
) -> torch.Tensor:
    """Mass of the blocks of a video in one order, fp32 [B, h, Mq, Nk]."""
    q, k, lse = in_order(q, grid, code, 1), in_order(k, grid, code, 1), in_order(lse, grid, code, 2)
    table = None if options.logit is None else TokenOrder(grid, (code,) * q.shape[2]).table(q.device)
    sums: torch.Tensor = block_sums(
        q, k, lse, None, grid.tokens, grid.tokens, *block, q.shape[3] ** -0.5 if scale is None else scale,
        options.backend, 0, table, *arguments(None if options.logit is None else options.logit.reach(grid)),
    )  # fmt: skip
    return sums


def _look(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    grid: VideoGrid,
    block: tuple[int, int],
    heads: slice,
    code: int,
    metric: OrderMetric,
    scale: float | None,
    options: KernelOptions,
) -> Look:
    q, k, lse = in_order(q, grid, code, 1), in_order(k, grid, code, 1), in_order(lse, grid, code, 2)
    stats = block_stats(
        q, k, lse, layout=TokenLayout(grid), block=UNIT, scale=scale, eps=metric.eps, options=options,
        order=None if options.logit is None else TokenOrder(grid, (code,) * q.shape[2]),
    )  # fmt: skip
    return Look(heads, code, *figures(stats, metric.sigma), coarser(stats.sums, block))


def figures(stats: BlockStats, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of empty blocks, mean of largest over mean entry), fp32 [B, H] each."""
    sparse = (stats.small >= sigma).float().mean((2, 3))
    even = torch.where(stats.sums == 0, 1.0, stats.peaks * stats.entries / stats.sums)
    return sparse, even.mean((2, 3))


def choose(sparse: torch.Tensor, uneven: torch.Tensor, alpha: float) -> torch.Tensor:
    """The best order of each head, int64 [H]: the least of alpha norm(1 - sparse) + (1 - alpha) norm(uneven).

    The published sign of M_sparse is inconsistent; this is the one that makes sense. `norm` divides by the sum over the
    orders. Of equal ones the first is taken, raster order before all others; NaN counts as the worst.

    Args:
        sparse, uneven: [orders, H], averages over whatever was looked at.
        alpha: see `OrderMetric`.
    """
    dense, rough = 1 - sparse, uneven
    parts = (x / x.sum(0).clamp(min=torch.finfo(x.dtype).tiny) for x in (dense, rough))
    cost = sum(weight * part for weight, part in zip((alpha, 1 - alpha), parts, strict=True))
    assert isinstance(cost, torch.Tensor)
    return cost.nan_to_num(torch.inf, torch.inf).argmin(0)


def in_order(x: torch.Tensor, grid: VideoGrid, code: int, dim: int) -> torch.Tensor:
    """A copy of x with the video tokens along `dim` in an order of the axes."""
    sizes = grid.frames, grid.height, grid.width
    axes = [dim + "FHW".index(axis) for axis in AXIS_ORDERS[code]]
    rest = range(dim + 3, x.dim() + 2)
    grid_like = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
    return grid_like.permute(*range(dim), *axes, *rest).flatten(dim, dim + 2).contiguous()


def coarser(sums: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Sums of `UNIT` blocks [..., M, N] added up to those of `block`."""
    rows, columns = block[0] // UNIT[0], block[1] // UNIT[1]
    if (rows, columns) == (1, 1):
        return sums
    sums = F.pad(sums, (0, -sums.shape[-1] % columns, 0, -sums.shape[-2] % rows))
    shape = (*sums.shape[:-2], sums.shape[-2] // rows, rows, sums.shape[-1] // columns, columns)
    return sums.view(shape).sum((-3, -1))


def search_orders(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    index: PackedIndex,
    codes: torch.Tensor,
    wanted: OrderSelection,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> None:
    """Write the order of every head into `codes`, and the map that keeps its largest blocks into `index`.

    Orders are chosen as `wanted.metric` says; by mass, at the density of this very map. They are shared by the samples
    of a batch, whose figures are averaged; maps are not. Nothing waits for the device.

    Args:
        q, k: [B, L, H, D] in raster order.
        lse: float32 [B, H, L] of the same call.
        index: for B samples and H heads over L tokens; what it held is overwritten.
        codes: int32 [H], indices into `AXIS_ORDERS`; read instead of written where `wanted.choose` is off.
        wanted: what to look for.
        options: backend "auto", "triton" or "torch"; libraries of attention count as "auto". logit as in the call that
            lse comes from.
    """
    grid, metric, counts = wanted.grid, wanted.metric, wanted.counts
    search_orders_op(
        q, k, lse, index.bits, index.row_ptr, index.order, codes, grid.frames, grid.height, grid.width, *index.block,
        counts.video_rows, counts.video_cols, counts.base, q.shape[3] ** -0.5, float(metric.alpha), float(metric.eps),
        float(metric.sigma), metric.by, wanted.choose, options.backend, *_numbers(options.logit),
    )  # fmt: skip


def _numbers(logit: FarLogits | None) -> tuple[float | None, int]:
    """A logit as an op takes it: the grid is known there."""
    return (None, 0) if logit is None else (float(logit.alpha), logit.trained)


@torch.library.custom_op(
    "videosparse::search_orders",
    mutates_args=("bits", "row_ptr", "order", "codes"),
    schema=(
        "(Tensor q, Tensor k, Tensor lse, Tensor(a!) bits, Tensor(b!) row_ptr, Tensor(c!) order, Tensor(d!) codes, "
        "SymInt frames, SymInt height, SymInt width, int block_rows, int block_cols, SymInt video_rows, "
        "SymInt video_cols, SymInt base, float scale, float alpha, float eps, float sigma, str by, bool choose, "
        "str backend, float? far_alpha, int far_trained) -> ()"
    ),
)
def search_orders_op(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    bits: torch.Tensor,
    row_ptr: torch.Tensor,
    order: torch.Tensor,
    codes: torch.Tensor,
    frames: int,
    height: int,
    width: int,
    block_rows: int,
    block_cols: int,
    video_rows: int,
    video_cols: int,
    base: int,
    scale: float,
    alpha: float,
    eps: float,
    sigma: float,
    by: str,
    choose: bool,
    backend: str,
    far_alpha: float | None,
    far_trained: int,
) -> None:
    """See `search_orders`."""
    grid, block = VideoGrid(frames, height, width), (block_rows, block_cols)
    metric = OrderMetric(alpha, eps, sigma, by)
    logit = None if far_alpha is None else FarLogits(far_trained, far_alpha)
    options = KernelOptions(backend=own_backend(backend), logit=logit)
    batch, length, heads, _ = q.shape
    rows, columns = bits.shape[2], ceil_div(length, block_cols)
    sums = torch.zeros(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    video = sums[:, :, :video_rows, :video_cols]
    most = torch.full((heads,), -torch.inf, dtype=torch.float32, device=q.device)
    if choose and by == "mass":
        for holding in holdings(q, k, lse, grid, block, base, scale=scale, options=options):
            _take_more(holding, codes, most, video)
    elif choose:
        for looks in look(q, k, lse, grid, block, metric=metric, scale=scale, options=options):
            _take_best(looks, codes, video, alpha)
    else:
        video.copy_(_sums_in_order(q, k, lse, grid, codes, block, scale, options))
    kept = torch.full((batch, heads), base, dtype=torch.int32, device=q.device)
    selection.kernels_for(backend, sums).keep_largest(sums, kept, bits, video_rows, video_cols)
    selection.write_places(kept, row_ptr, order, (rows, columns), (video_rows, video_cols))


def _take_best(looks: list[Look], codes: torch.Tensor, sums: torch.Tensor, alpha: float) -> None:
    """Write the codes [H] of a group of heads, and their sums [B, H, Mq, Nk] in these orders."""
    part = looks[0].heads
    sparse, uneven = (torch.stack([getattr(one, name).mean(0) for one in looks]) for name in ("sparse", "uneven"))
    codes[part] = choose(sparse, uneven, alpha).to(codes.dtype)
    found = torch.stack([one.sums for one in looks], 2)  # [B, h, orders, Mq, Nk]
    own = codes[part].long()[None, :, None, None, None].expand(found.shape[0], -1, 1, *found.shape[3:])
    sums[:, part] = found.gather(2, own)[:, :, 0]


def _take_more(found: Holding, codes: torch.Tensor, most: torch.Tensor, sums: torch.Tensor) -> None:
    """Write the code and sums of an order where heads hold more in it than in those before; NaN is never more.

    Args:
        found: in one order; the first one is raster order.
        codes: [H], written.
        most: fp32 [H], -inf at first, what each head holds in the order of its code; written.
        sums: fp32 [B, H, Mq, Nk], written.
    """
    part, share = found.heads, found.share.mean(0)
    more = share > most[part] if found.code else torch.ones_like(share, dtype=torch.bool)
    most[part] = torch.where(more, share, most[part]).nan_to_num(-torch.inf)
    codes[part] = codes[part].masked_fill(more, found.code)
    sums[:, part] = torch.where(more[None, :, None, None], found.sums, sums[:, part])


def _sums_in_order(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    grid: VideoGrid,
    codes: torch.Tensor,
    block: tuple[int, int],
    scale: float,
    options: KernelOptions,
) -> torch.Tensor:
    """Mass of the video blocks in the orders that the device knows, fp32 [B, H, Mq, Nk]."""
    layout, order = TokenLayout(grid), SearchedOrder(grid, codes)
    q, k = (reorder(x[:, : grid.tokens], order, layout, options=options) for x in (q, k))
    raster = torch.arange(grid.tokens, device=codes.device)
    places = torch.stack([in_order(raster, grid, code, 0) for code in ORDERS]).index_select(0, codes)
    level = lse[:, :, : grid.tokens].gather(2, places[None].expand(q.shape[0], -1, -1))
    far = arguments(None if options.logit is None else options.logit.reach(grid))
    sums: torch.Tensor = block_sums(
        q, k, level, None, grid.tokens, grid.tokens, *block, scale, options.backend, 0,
        None if far[0] is None else order.table(q.device), *far,
    )  # fmt: skip
    return sums


@search_orders_op.register_fake
def _search_orders_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    bits: torch.Tensor,
    row_ptr: torch.Tensor,
    order: torch.Tensor,
    codes: torch.Tensor,
    frames: int,
    height: int,
    width: int,
    block_rows: int,
    block_cols: int,
    video_rows: int,
    video_cols: int,
    base: int,
    scale: float,
    alpha: float,
    eps: float,
    sigma: float,
    by: str,
    choose: bool,
    backend: str,
    far_alpha: float | None,
    far_trained: int,
) -> None:
    return None
