"""The custom ops behind `attend` and `block_sums`: one node in a compiled graph, whichever backend runs it.

The backend is chosen when an op runs, not when it is traced. Geometry travels as plain ints, the lists as tensors, so
that swapping the tensors of a plan never recompiles.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from videosparse.blocks import transpose_lists
from videosparse.kernels import gpu, int8_path, torch_order, torch_path
from videosparse.kernels.backend import choose, choose_own
from videosparse.kernels.call import AttentionCall, Lists, wide
from videosparse.kernels.options import LIBRARIES
from videosparse.kernels.reorder_op import move
from videosparse.kernels.steps import Steps
from videosparse.layout import ceil_div
from videosparse.logits import from_arguments

logger = logging.getLogger("videosparse")

_GEOMETRY = (
    "Tensor? row_ptr, Tensor? ids, Tensor? order, Tensor? seq_lens, SymInt video, SymInt text_start, "
    "int block_rows, int block_cols, int map_samples, int map_heads, float scale, "
    "float? far_alpha, SymInt far_window, SymInt far_first, SymInt far_seen"
)
NO_GRADIENT = "logit is for inference: it has no gradient. Use torch.no_grad(), or logit=None in training."
_KEY_MAJOR = "Tensor? key_row_ptr, Tensor? key_ids, Tensor? key_order"


def _call(
    row_ptr: torch.Tensor | None,
    ids: torch.Tensor | None,
    order: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    video: int,
    text_start: int,
    block_rows: int,
    block_cols: int,
    map_samples: int,
    map_heads: int,
    scale: float,
    *far: Any,
) -> AttentionCall:
    lists = None
    if row_ptr is not None and ids is not None and order is not None:
        lists = Lists(row_ptr, ids, order, (block_rows, block_cols), map_samples, map_heads)
    return AttentionCall(lists, seq_lens, video, text_start, scale, far=from_arguments(*far))


@torch.library.custom_op(
    "videosparse::attend_forward",
    mutates_args=(),
    schema=(
        f"(Tensor q, Tensor k, Tensor v, {_GEOMETRY}, bool need_lse, str backend, str? quant, bool need_grad, "
        f"{_KEY_MAJOR}) -> (Tensor, Tensor)"
    ),
)
def attend_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, L, H, D] and lse [B, H, L], which is empty unless `need_lse` or `need_grad`.

    The Triton backward reads lse, and the key-major lists, which pass through to it. The torch backward needs neither:
    with `need_grad` alone its lse has the shape, and -inf throughout.
    """
    *geometry, need_lse, backend, quant, need_grad, _, _, _ = rest
    call = _call(*geometry)
    chosen = choose(backend, q.device, q.dtype)
    out, lse = _run(chosen, quant, q, k, v, call, need_lse or (need_grad and chosen != "torch"))
    return out, _no_lse(q) if need_grad and not need_lse and chosen == "torch" else lse


def _run(
    chosen: str,
    quant: str | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a backend."""
    if quant is not None:
        return int8_path.forward(q, k, v, call, need_lse, quant, chosen)
    if chosen == "torch":
        return torch_path.forward(q, k, v, call, need_lse)
    if chosen in LIBRARIES:
        return _library(chosen, q, k, v, call, need_lse)
    return gpu.forward(q, k, v, call, need_lse)


def _no_lse(q: torch.Tensor) -> torch.Tensor:
    batch, length, heads, _ = q.shape
    return torch.full((batch, heads, length), -torch.inf, dtype=wide(q.dtype), device=q.device)


def _library(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a library that was asked for; imported on first use."""
    with gpu.on_device(q):
        if name == "fa4":
            from videosparse.kernels import fa4_path

            return fa4_path.forward(q, k, v, call, need_lse)
        from videosparse.kernels import flex_path

        return flex_path.forward(q, k, v, call, need_lse)


@attend_forward.register_fake
def _attend_forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = q.shape
    *_, need_lse, _backend, _quant, need_grad, _key_row_ptr, _key_ids, _key_order = rest
    lse_shape = (batch, heads, length) if need_lse or need_grad else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=wide(q.dtype))


@torch.library.custom_op(
    "videosparse::attend_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_GEOMETRY}, str backend, {_KEY_MAJOR}) -> (Tensor, Tensor, Tensor)"
    ),
)
def attend_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, by the backend that ran the forward, or by ours where that was a library."""
    *geometry, backend, key_row_ptr, key_ids, key_order = rest
    call = _call(*geometry)
    if call.far is not None:
        raise NotImplementedError(NO_GRADIENT)
    if choose_own(backend, q.device, q.dtype, "gradients of attend") == "torch":
        return torch_path.backward(grad, grad_lse, q, k, v, call)
    if lse.numel() != q.shape[0] * q.shape[1] * q.shape[2]:
        raise RuntimeError("Gradients need the lse of the forward; call attend, or attend_forward with need_grad=True.")
    by_key = _key_major(call, q.shape[1], key_row_ptr, key_ids, key_order)
    return gpu.backward(grad, grad_lse, q, k, v, out, lse, call, by_key)


def _key_major(
    call: AttentionCall,
    length: int,
    row_ptr: torch.Tensor | None,
    ids: torch.Tensor | None,
    order: torch.Tensor | None,
) -> Lists | None:
    """The key-major lists of a call: those given, else made from its own lists, on the device."""
    lists = call.lists
    if lists is None:
        return None
    if row_ptr is None or ids is None or order is None:
        _say_that_lists_are_turned()
        blocks = (ceil_div(length, lists.block[0]), ceil_div(length, lists.block[1]))
        row_ptr, ids, order = transpose_lists(lists.row_ptr, lists.ids, (lists.samples, lists.heads, *blocks))
    return Lists(row_ptr, ids, order, (lists.block[1], lists.block[0]), lists.samples, lists.heads)


@cache
def _say_that_lists_are_turned() -> None:
    logger.info(
        "attend was not given key-major lists and makes them in every backward pass; BlockIndex.prepare_backward "
        "saves that."
    )


@attend_backward.register_fake
def _attend_backward_fake(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *call, need_lse, backend, _quant, _need_grad, key_row_ptr, key_ids, key_order = inputs
    q, k, v, row_ptr, ids, order, seq_lens, *numbers = call
    ctx.save_for_backward(q, k, v, *output, row_ptr, ids, order, seq_lens, key_row_ptr, key_ids, key_order)
    ctx.numbers = (*numbers, backend)
    ctx.need_lse = need_lse


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, key_row_ptr, key_ids, key_order = ctx.saved_tensors
    level = grad_lse if ctx.need_lse else None
    grads = attend_backward(grad_out, level, *tensors, *ctx.numbers, key_row_ptr, key_ids, key_order)
    return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


attend_forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "videosparse::attend_in_order",
    mutates_args=(),
    schema=(
        f"(Tensor q, Tensor k, Tensor v, {_GEOMETRY}, bool need_lse, str backend, str? quant, Tensor table, "
        "SymInt height, SymInt width) -> (Tensor, Tensor)"
    ),
)
def attend_in_order(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, k and v [B, L, H, D] in a token order; out and lse in raster order. No gradient.

    Our Triton kernels write their rows where they belong; what the others return, those for integers among them, is
    reordered by a copy.
    """
    *geometry, need_lse, backend, quant, table, height, width = rest
    call = _call(*geometry)
    chosen = choose(backend, q.device, q.dtype)
    if chosen == "triton" and quant is None and (call.video <= gpu.MOST_ORDERED or call.far is not None):
        return gpu.forward(q, k, v, replace(call, order=table), need_lse)
    if call.far is not None:
        call = replace(call, order=table)
    out, lse = _run(chosen, quant, q, k, v, call, need_lse)
    steps = Steps(table, call.video, height, width)
    return move(out, steps, True, backend), torch_order.raster_lse(lse, steps) if need_lse else lse


@attend_in_order.register_fake
def _attend_in_order_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *_, need_lse, _backend, _quant, _table, _height, _width = rest
    shape = (q.shape[0], q.shape[2], q.shape[1]) if need_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=wide(q.dtype))


@torch.library.custom_op(
    "videosparse::block_sums",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor lse, Tensor? seq_lens, SymInt video, SymInt text_start, "
        "int block_rows, int block_cols, float scale, str backend, int sample, Tensor? table, "
        "float? far_alpha, SymInt far_window, SymInt far_first, SymInt far_seen) -> Tensor"
    ),
)
def block_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor | None,
    video: int,
    text_start: int,
    block_rows: int,
    block_cols: int,
    scale: float,
    backend: str,
    sample: int,
    table: torch.Tensor | None,
    *far: Any,
) -> torch.Tensor:
    """Mass of every block, fp32 [B, H, Mq, Nk]; `sample` rows of each are visited, 0 visits all.

    `table` is the token order of q, k and lse, where scores of far tokens are changed in one; see `axis_table`.
    """
    call = AttentionCall(None, seq_lens, video, text_start, scale, table, from_arguments(*far))
    block = block_rows, block_cols
    if choose_own(backend, q.device, q.dtype, "block_sums") == "torch":
        return torch_path.block_sums(q, k, lse, call, block, sample or block_rows)
    if sample in (0, block_rows):
        return gpu.block_sums(q, k, lse, call, block)
    from videosparse.kernels import triton_sampled

    sums: torch.Tensor = triton_sampled.block_sums(q, k, lse, call, block, sample)
    return sums


@block_sums.register_fake
def _block_sums_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor | None,
    video: int,
    text_start: int,
    block_rows: int,
    block_cols: int,
    scale: float,
    backend: str,
    sample: int,
    table: torch.Tensor | None,
    *far: Any,
) -> torch.Tensor:
    batch, length, heads, _ = q.shape
    shape = (batch, heads, ceil_div(length, block_rows), ceil_div(length, block_cols))
    return q.new_empty(shape, dtype=torch.float32)
