"""The only door to attention kernels: `attend`, `block_sums` and `block_stats` for methods that look at attention, and
`norm_rotate` and `reorder` before it. `selection` and `order_search` make maps and orders of what is looked at.

Importing this package needs neither Triton nor a GPU: Triton is imported when a call first takes its backend.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from videosparse.blocks import BlockIndex, check_block
from videosparse.checking import check_flag
from videosparse.kernels import checks, int8_path, ops, torch_order
from videosparse.kernels.backend import choose_own, describe_backend
from videosparse.kernels.norm_op import norm_rotate
from videosparse.kernels.options import KernelOptions
from videosparse.kernels.reorder_op import reorder
from videosparse.kernels.stats import BlockStats, block_stats
from videosparse.kernels.steps import steps_of
from videosparse.kernels.stream import Stream
from videosparse.layout import TokenLayout
from videosparse.logits import Arguments, arguments
from videosparse.ordering import AnyOrder

__all__ = [
    "BlockStats",
    "KernelOptions",
    "Stream",
    "attend",
    "block_stats",
    "block_sums",
    "describe_backend",
    "norm_rotate",
    "reorder",
]


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    index: BlockIndex | None = None,
    order: AnyOrder | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    options: KernelOptions = ...,
) -> torch.Tensor: ...


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    index: BlockIndex | None = None,
    order: AnyOrder | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    options: KernelOptions = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    index: BlockIndex | None = None,
    order: AnyOrder | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention over a video sequence, reading only the key blocks that `index` lists.

    Keys count when they are valid tokens: every video token, and text before the sample's `layout.seq_lens`. What lies
    in the gap or in padding is never read, so it may hold anything. A row that is no valid token, or that reads no
    key, gives 0. Calls compile to one node (`torch.compile(fullgraph=True)`).

    The Triton backend takes float16, bfloat16 and float32 and never waits for the device. The torch backend also takes
    float64, runs anywhere, and waits for the device to read the lists. Gradients come from the backend that ran the
    forward, or from ours where that was a library; Triton's are equal to the bit for equal inputs, and never wait
    either.

    Args:
        q, k, v: [B, L, H, D] with L = layout.length and D 8..128; any strides, contiguous along D.
        layout: which positions are video, gap, text and padding.
        index: block lists for all or some samples and heads ([B or 1] x [H or 1]); None reads every valid key.
        order: the token order that q, k and v come in, which is also that of the index; out and lse are returned in
            raster order, without a copy where our Triton kernels run and nothing needs a gradient.
        scale: factor of the scores; default D ** -0.5.
        return_lse: also return the log-sum-exp of each row's scaled scores.
        options: backend and variants; see `KernelOptions`.

    With `options.quant` the scores are products of integers, and outputs differ from exact ones by about 1 % in the
    mean ("int8"), 1.6 % ("int8-int8") or 4 % ("int8-fp8") for normally distributed q, k and v; see `quantize`.

    Source: FlashAttention-2 (arXiv 2307.08691), forward and backward, whose loops over all key blocks go over the
    listed ones here.

    Returns:
        out [B, L, H, D], contiguous, in the dtype of q. With `return_lse` also lse [B, H, L], float32 (float64 for
        float64 inputs), natural log, -inf where out is 0 for want of keys.

    Raises:
        ValueError: shapes, devices or strides that do not fit one another, the layout, the index or the order; a scale
            that is not finite; lists that name blocks which there are not, where plain torch reads them.
        TypeError: dtypes that differ or are not supported; an argument of another type.
        NotImplementedError: gradients are needed with options.quant or options.logit, or in forward mode.
        RuntimeError: options.backend or options.quant cannot run here, or is a library that cannot take this call.
    """
    checks.check_options(options)
    check_flag("return_lse", return_lse)
    checks.check_tensors({"q": q, "k": k, "v": v}, layout)
    checks.check_no_tangents({"q": q, "k": k, "v": v})
    if index is not None:
        checks.check_index(q, index)
    need_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if options.logit is not None and need_grad:
        raise NotImplementedError(ops.NO_GRADIENT)
    if options.quant is not None:
        int8_path.check(q, options.quant, need_grad)
    key_major = _key_major(q, index, options) if need_grad else None
    rows, cols = (0, 0) if index is None else index.block
    samples, heads = (1, 1) if index is None else index.shape[:2]
    call = (
        q,
        k,
        v,
        None if index is None else index.row_ptr,
        None if index is None else index.ids,
        None if index is None else index.order,
        layout.seq_lens if layout.text else None,
        layout.video,
        layout.text_start if layout.text else layout.video,
        rows,
        cols,
        samples,
        heads,
        checks.scale_of(q, scale),
        *_far(options, layout),
        return_lse,
        options.backend,
        options.quant,
    )
    steps = None if order is None else steps_of(order, q.shape[2], layout.grid, q.device)
    if steps is not None and not need_grad:
        out, lse = ops.attend_in_order(*call, steps.table, steps.height, steps.width)
        return (out, lse) if return_lse else out
    out, lse = ops.attend_forward(
        *call,
        need_grad,
        None if key_major is None else key_major.row_ptr,
        None if key_major is None else key_major.ids,
        None if key_major is None else key_major.order,
    )
    if order is not None and steps is not None:
        # the backward kernels read out and lse in the order of q: these are turned by copies, whose gradient is known
        out = reorder(out, order, layout, inverse=True, options=options)
        lse = torch_order.raster_lse(lse, steps) if return_lse else lse
    return (out, lse) if return_lse else out


def _far(options: KernelOptions, layout: TokenLayout) -> Arguments:
    """How scores of far tokens are changed, as the ops take it; in a video that is short enough not at all."""
    return arguments(None if options.logit is None else options.logit.reach(layout.grid))


def _key_major(q: torch.Tensor, index: BlockIndex | None, options: KernelOptions) -> BlockIndex | None:
    """The key-major lists of an index, where the backward kernels will read them."""
    if index is None:
        return None
    # they are made outside any graph: a compiled block reads tensors only
    if (
        not torch.compiler.is_compiling()
        and choose_own(options.backend, q.device, q.dtype, "gradients of attend") == "triton"
    ):
        index.prepare_backward()
    return index.key_major


def block_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    layout: TokenLayout,
    block: tuple[int, int],
    scale: float | None = None,
    sample: int | None = None,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> torch.Tensor:
    """The attention mass of every block: sum of exp(score - lse) over its valid rows and keys.

    With the lse of the same q and k, a block row sums to its number of valid query tokens; with an older lse
    (AdaSpa, arXiv 2502.21079, refreshes that way) it is an estimate. Scores are fp32. The Triton backend recomputes
    the scores tile by tile and never waits for the device; the torch backend holds them for a strip of rows at a
    time. No gradient.

    Args:
        q, k: [B, L, H, D] as in `attend`.
        lse: float32 [B, H, L], natural log, as `attend(return_lse=True)` gives it; rows of -inf count nothing.
        layout: which positions are valid.
        block: (query rows, key rows) of a block, each 64 or 128.
        scale: factor of the scores; default D ** -0.5.
        sample: rows of a block of queries to visit, 8, 16, 32 or 64: those whose place in it is a multiple of
            block[0] / sample. Their sum, times the valid rows of the block over the visited ones, is an estimate at
            sample / block[0] of the work. None visits all, which is exact.
        options: backend "auto", "triton" or "torch"; libraries of attention have no such kernel, and count as "auto".
            logit as in the call that lse comes from.

    Returns:
        float32 [B, H, ceil(L / block[0]), ceil(L / block[1])].

    Raises:
        ValueError, TypeError: as `attend`, and for an lse of another shape or dtype, or a sample of another size.
        RuntimeError: options.backend is "triton", which cannot run here.
    """
    checks.check_options(options)
    check_block(block)
    checks.check_sample(sample)
    checks.check_tensors({"q": q, "k": k}, layout)
    checks.check_lse(q, lse)
    sums: torch.Tensor = ops.block_sums(
        q,
        k,
        lse,
        layout.seq_lens if layout.text else None,
        layout.video,
        layout.text_start if layout.text else layout.video,
        *block,
        checks.scale_of(q, scale),
        options.backend,
        sample or 0,
        None,
        *_far(options, layout),
    )
    return sums
