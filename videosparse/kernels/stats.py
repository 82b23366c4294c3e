"""What the probabilities inside every block look like: `block_stats`, for choosing token orders and static maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from videosparse.blocks import check_block
from videosparse.checking import check_number
from videosparse.kernels import checks, torch_stats
from videosparse.kernels.backend import choose_own
from videosparse.kernels.call import AttentionCall
from videosparse.kernels.options import KernelOptions
from videosparse.kernels.steps import steps_of
from videosparse.layout import TokenLayout, ceil_div
from videosparse.logits import arguments, from_arguments
from videosparse.ordering import AnyOrder


class BlockStats(NamedTuple):
    """Figures of every block, fp32 [B, H, ceil(L / block[0]), ceil(L / block[1])] each.

    Args:
        sums: attention mass, as `block_sums` gives it.
        peaks: largest probability; 0 where there is none.
        small: share of the probabilities that are below eps, 0..1; 1 where there are none.
        entries: how many probabilities there are: valid queries times valid keys, [B, 1, ...].
    """

    sums: torch.Tensor
    peaks: torch.Tensor
    small: torch.Tensor
    entries: torch.Tensor


def block_stats(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    layout: TokenLayout,
    block: tuple[int, int],
    scale: float | None = None,
    eps: float = 1e-3,
    order: AnyOrder | None = None,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> BlockStats:
    """Sum, largest entry, and share of entries below `eps` of every block of softmax(Q K^T * scale).

    What PAROAttention (arXiv 2506.16054) judges a token order by. As `block_sums`, it takes the softmax's normalisers
    and holds no L x L tensor: the Triton backend recomputes the scores tile by tile and never waits for the device; the
    torch backend holds them for a strip of rows. To bound memory at great lengths, call it for some heads at a time.
    Nothing but text lengths decides what is valid: a key in padding or the gap is no entry. No gradient.

    Args:
        q, k: [B, L, H, D] as in `attend`.
        lse: float32 [B, H, L], natural log, as `attend(return_lse=True)` gives it; rows of -inf hold zeros.
        layout: which positions are valid.
        block: (query rows, key rows) of a block, each 64 or 128.
        scale: factor of the scores; default D ** -0.5.
        eps: what counts as small, > 0.
        order: the token order that q, k and lse come in, which only options.logit asks for; checked without, too.
        options: backend "auto", "triton" or "torch"; libraries of attention have no such kernel, and count as "auto".

    Raises:
        ValueError, TypeError: as `attend`, and for an lse of another shape or dtype, an order of other heads or of
            another grid, or an eps that is not positive.
        RuntimeError: options.backend is "triton", which cannot run here.
    """
    checks.check_options(options)
    check_block(block)
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps must be positive (got {eps}); the published value is 1e-3.")
    checks.check_tensors({"q": q, "k": k}, layout)
    checks.check_lse(q, lse)
    found = block_stats_op(
        q,
        k,
        lse,
        layout.seq_lens if layout.text else None,
        layout.video,
        layout.text_start if layout.text else layout.video,
        *block,
        checks.scale_of(q, scale),
        float(eps),
        options.backend,
        None if order is None else steps_of(order, q.shape[2], layout.grid, q.device).table,
        *arguments(None if options.logit is None else options.logit.reach(layout.grid)),
    )
    entries = _entries(layout, q.shape[0], block, q.device)
    # what is not valid is never large, so that counting the large ones needs no mask
    small = torch.where(entries > 0, 1 - found[2] / entries.clamp(min=1), 1.0)
    return BlockStats(found[0], found[1], small, entries)


def _entries(layout: TokenLayout, batch: int, block: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Valid queries times valid keys of every block, fp32 [B, 1, Mq, Nk]."""
    valid = layout.key_mask(batch, device).float()
    rows, cols = (F.pad(valid, (0, -layout.length % b)).view(batch, -1, b).sum(2) for b in block)
    return (rows[:, :, None] * cols[:, None, :])[:, None]


@torch.library.custom_op(
    "videosparse::block_stats",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor lse, Tensor? seq_lens, SymInt video, SymInt text_start, "
        "int block_rows, int block_cols, float scale, float eps, str backend, Tensor? table, "
        "float? far_alpha, SymInt far_window, SymInt far_first, SymInt far_seen) -> Tensor"
    ),
)
def block_stats_op(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor | None,
    video: int,
    text_start: int,
    block_rows: int,
    block_cols: int,
    scale: float,
    eps: float,
    backend: str,
    table: torch.Tensor | None,
    *far: Any,
) -> torch.Tensor:
    """fp32 [3, B, H, Mq, Nk]: sums, largest entries, and how many entries are at least eps."""
    call = AttentionCall(None, seq_lens, video, text_start, scale, table, from_arguments(*far))
    block = block_rows, block_cols
    if choose_own(backend, q.device, q.dtype, "block_stats") == "torch":
        return torch_stats.block_stats(q, k, lse, call, block, eps)
    from videosparse.kernels import triton_stats

    stats: torch.Tensor = triton_stats.block_stats(q, k, lse, call, block, eps)
    return stats


@block_stats_op.register_fake
def _block_stats_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor | None,
    video: int,
    text_start: int,
    block_rows: int,
    block_cols: int,
    scale: float,
    eps: float,
    backend: str,
    table: torch.Tensor | None,
    *far: Any,
) -> torch.Tensor:
    batch, length, heads, _ = q.shape
    shape = (3, batch, heads, ceil_div(length, block_rows), ceil_div(length, block_cols))
    return q.new_empty(shape, dtype=torch.float32)
