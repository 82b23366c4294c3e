"""`reorder`: the video tokens of a tensor in a token order, or back in raster order; also joins video and text.

One custom op, which is one node in a compiled graph. It reads the order as a tensor, so swapping orders never
recompiles. Its gradient is the inverse.
"""

from __future__ import annotations

from typing import Any

import torch

from videosparse.checking import check_flag, check_tensor
from videosparse.kernels import torch_order
from videosparse.kernels.backend import choose_own
from videosparse.kernels.checks import check_options
from videosparse.kernels.options import KernelOptions
from videosparse.kernels.steps import Steps, steps_of
from videosparse.layout import TokenLayout, check_is_layout
from videosparse.ordering import AnyOrder


def move(x: torch.Tensor, steps: Steps, inverse: bool, backend: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """`reorder` of the backend that runs here; see `torch_order.reorder` for the arguments."""
    if choose_own(backend, x.device, x.dtype, "reorder") == "torch":
        return torch_order.reorder(x, steps, inverse, out)
    from videosparse.kernels import triton_order

    return triton_order.reorder(x, steps, inverse, out)


@torch.library.custom_op(
    "videosparse::reorder",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? text, Tensor table, SymInt video, SymInt height, SymInt width, SymInt text_start, "
        "bool inverse, str backend) -> Tensor"
    ),
)
def reorder_op(
    x: torch.Tensor,
    text: torch.Tensor | None,
    table: torch.Tensor,
    video: int,
    height: int,
    width: int,
    text_start: int,
    inverse: bool,
    backend: str,
) -> torch.Tensor:
    """[B, L, H, D] from x [B, L, H, D]; with text [B, T, H, D] from x [B, video, H, D], zeros up to `text_start`."""
    steps = Steps(table, video, height, width)
    if x.stride(3) != 1:  # gradients may be expanded
        x = x.contiguous()
    if text is None:
        return move(x, steps, inverse, backend)
    batch, tokens, heads, head_dim = text.shape
    out = torch.empty((batch, text_start + tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    move(x, steps, inverse, backend, out)
    out[:, video:text_start] = 0
    out[:, text_start:] = text
    return out


@reorder_op.register_fake
def _reorder_fake(
    x: torch.Tensor,
    text: torch.Tensor | None,
    table: torch.Tensor,
    video: int,
    height: int,
    width: int,
    text_start: int,
    inverse: bool,
    backend: str,
) -> torch.Tensor:
    length = x.shape[1] if text is None else text_start + text.shape[1]
    return x.new_empty((x.shape[0], length, x.shape[2], x.shape[3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, text, table, *ctx.numbers = inputs
    ctx.save_for_backward(table)
    ctx.joined = text is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    video, height, width, text_start, inverse, backend = ctx.numbers
    part = grad[:, :video] if ctx.joined else grad
    back = reorder_op(part, None, table, video, height, width, video, not inverse, backend)
    return back, grad[:, text_start:] if ctx.joined else None, *[None] * 7


reorder_op.register_autograd(_backward, setup_context=_save)


def reorder(
    x: torch.Tensor,
    order: AnyOrder,
    layout: TokenLayout,
    *,
    text: torch.Tensor | None = None,
    inverse: bool = False,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> torch.Tensor:
    """The video tokens of x in an order (PAROAttention, arXiv 2506.16054), bit by bit; text and gap stay.

    Args:
        x: [B, L, H, D] in raster order, any dtype and strides; with `text`, [B, V, H, D].
        order: the order, for H heads.
        layout: of the sequence; `layout.grid` is the grid of the order.
        text: [B, T, H, D] to be joined: the result is [B, layout.length, H, D] with zeros in the gap.
        inverse: from the order back to raster order.
        options: `backend` "auto", "triton" or "torch"; a library for attention is as "auto". Nothing else is read.

    Returns:
        A new tensor, contiguous, in the dtype of x.

    Raises:
        TypeError: an argument of another type.
        ValueError: the order is for other heads, another grid or device, or shapes do not fit the layout.
        RuntimeError: options.backend is "triton", which cannot run here.
    """
    check_options(options)
    check_is_layout(layout)
    check_flag("inverse", inverse)
    _check_lengths(x, text, layout)
    steps = steps_of(order, x.shape[2], layout.grid, x.device)
    start = layout.text_start if layout.text else layout.video
    out: torch.Tensor = reorder_op(
        x, text, steps.table, steps.video, steps.height, steps.width, start, inverse, options.backend
    )
    return out


def _check_lengths(x: torch.Tensor, text: torch.Tensor | None, layout: TokenLayout) -> None:
    """Raise TypeError or ValueError unless x [B, L, H, D], and text where given, are what a layout says."""
    check_tensor("x", x, " [batch, length, heads, head_dim]")
    if text is not None:
        check_tensor("text", text, " [batch, tokens, heads, head_dim], or None")
    if x.dim() != 4 or x.shape[1] != (layout.length if text is None else layout.video):
        raise ValueError(
            f"x must be [batch, {layout.length if text is None else layout.video} tokens, heads, head_dim] for this "
            f"layout (got {list(x.shape)})."
        )
    if text is not None and text.shape != (x.shape[0], layout.text, *x.shape[2:]):
        raise ValueError(
            f"text must be {[x.shape[0], layout.text, *x.shape[2:]]} for this layout (got {list(text.shape)})."
        )
