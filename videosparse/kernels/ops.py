"""The custom ops behind `attend` and `block_sums`: one node in a compiled graph, whichever backend runs it.

The backend is chosen when an op runs, not when it is traced. Geometry travels as plain ints, the lists as tensors, so
that swapping the tensors of a plan never recompiles.
"""

from __future__ import annotations

from typing import Any

import torch

from videosparse.kernels import gpu, torch_path
from videosparse.kernels.backend import choose
from videosparse.kernels.call import AttentionCall, Lists

_GEOMETRY = (
    "Tensor? row_ptr, Tensor? ids, Tensor? order, Tensor? seq_lens, SymInt video, SymInt text_start, "
    "int block_rows, int block_cols, int map_samples, int map_heads, float scale"
)


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
) -> AttentionCall:
    lists = None
    if row_ptr is not None and ids is not None and order is not None:
        lists = Lists(row_ptr, ids, order, (block_rows, block_cols), map_samples, map_heads)
    return AttentionCall(lists, seq_lens, video, text_start, scale)


@torch.library.custom_op(
    "videosparse::attend_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_GEOMETRY}, bool need_lse, str backend) -> (Tensor, Tensor)",
)
def attend_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, L, H, D] and lse [B, H, L], which is empty unless `need_lse`."""
    *geometry, need_lse, backend = rest
    call = _call(*geometry)
    if choose(backend, q.device, q.dtype) == "torch":
        return torch_path.forward(q, k, v, call, need_lse)
    return gpu.forward(q, k, v, call, need_lse)


@attend_forward.register_fake
def _attend_forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = q.shape
    lse_shape = (batch, heads, length) if rest[-2] else (0,)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=dtype)


@torch.library.custom_op(
    "videosparse::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, {_GEOMETRY}) -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *geometry: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v. Always in torch, which computes the scores again and is slow on a GPU."""
    return torch_path.backward(grad, grad_lse, q, k, v, _call(*geometry))


@attend_backward.register_fake
def _attend_backward_fake(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *geometry: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, video, text_start, rows, cols, samples, heads, scale, need_lse, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = (video, text_start, rows, cols, samples, heads, scale)
    ctx.need_lse = need_lse


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, *lists = ctx.saved_tensors
    level = grad_lse if ctx.need_lse else None
    grads = attend_backward(grad_out, level, q, k, v, *lists, *ctx.numbers)
    return (*grads, *[None] * 13)


attend_forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "videosparse::block_sums",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor lse, Tensor? seq_lens, SymInt video, SymInt text_start, "
        "int block_rows, int block_cols, float scale) -> Tensor"
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
) -> torch.Tensor:
    """Mass of every block, fp32 [B, H, Mq, Nk]."""
    call = AttentionCall(None, seq_lens, video, text_start, scale)
    return torch_path.block_sums(q, k, lse, call, (block_rows, block_cols))


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
) -> torch.Tensor:
    batch, length, heads, _ = q.shape
    shape = (batch, heads, -(-length // block_rows), -(-length // block_cols))
    return q.new_empty(shape, dtype=torch.float32)
