"""`norm_rotate`: queries and keys from their projections to what attention reads, in one pass over memory.

One custom op, which is one node in a compiled graph. The backend is chosen when it runs, not when it is traced.
"""

from __future__ import annotations

import torch

from videosparse.checking import check_number, check_tensor, check_whole, shown
from videosparse.kernels import torch_norm
from videosparse.kernels.backend import TRITON_DTYPES, choose
from videosparse.kernels.checks import check_options
from videosparse.kernels.options import KernelOptions, own_backend
from videosparse.kernels.steps import Steps, steps_of
from videosparse.kernels.stream import Pair, Stream
from videosparse.ordering import AnyOrder, check_is_order

DTYPES = (*TRITON_DTYPES, torch.float64)
MAX_WIDTH = 16384
"""Elements of a row, with heads padded to a power of two, that the registers of one program hold."""


def row_width(heads: int, head_dim: int) -> int:
    """Elements of a row of heads that are padded to a power of two."""
    return heads << (head_dim - 1).bit_length()


@torch.library.custom_op("videosparse::norm_rotate", mutates_args=())
def norm_rotate_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    text_q: torch.Tensor | None,
    text_k: torch.Tensor | None,
    text_q_weight: torch.Tensor | None,
    text_k_weight: torch.Tensor | None,
    text_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    text_start: int,
    backend: str,
    table: torch.Tensor | None = None,
    height: int = 1,
    width: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [B, L, H, D]."""
    video, text = Stream(q, k, q_weight, k_weight, eps), None
    if text_q is not None and text_k is not None and text_q_weight is not None and text_k_weight is not None:
        text = Stream(text_q, text_k, text_q_weight, text_k_weight, text_eps)
    rotary = None if cos is None or sin is None else (cos, sin)
    order = None if table is None else Steps(table, q.shape[1], height, width)
    if choose(backend, q.device, q.dtype, "norm_rotate") == "torch":
        return torch_norm.forward(video, text, rotary, heads, text_start, order)
    from videosparse.kernels import triton_norm

    return triton_norm.forward(video, text, rotary, heads, text_start, order)


@norm_rotate_forward.register_fake
def _norm_rotate_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    text_q: torch.Tensor | None,
    text_k: torch.Tensor | None,
    text_q_weight: torch.Tensor | None,
    text_k_weight: torch.Tensor | None,
    text_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    text_start: int,
    backend: str,
    table: torch.Tensor | None = None,
    height: int = 1,
    width: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    length = q.shape[1] if text_q is None else text_start + text_q.shape[1]
    shape = (q.shape[0], length, heads, q.shape[2] // heads)
    return q.new_empty(shape), q.new_empty(shape)


def norm_rotate(
    video: Stream,
    text: Stream | None = None,
    *,
    heads: int,
    rotary: Pair | None = None,
    text_start: int | None = None,
    order: AnyOrder | None = None,
    options: KernelOptions = KernelOptions(),  # noqa: B008  frozen, so one instance serves every call
) -> Pair:
    """RMS norm of queries and keys, and rotation of the video's, into the one sequence that attention reads.

    Computed in float32 (float64 for float64 projections) and rounded once, where step by step each step rounds. The
    call compiles to one node (`torch.compile(fullgraph=True)`) and never waits for the device. No gradient.

    Source: RMS norm, arXiv 1910.07467; rotary embedding, arXiv 2104.09864.

    Args:
        video: projections of the video tokens, [B, S, H * D], and their norms.
        text: those of the text tokens, [B, T, H * D], for models whose sequence has them. They are not rotated.
        heads: H.
        rotary: cos and sin [S, 1 or H, D / 2], any strides: the pair (2i, 2i + 1) of a head turns by angle i.
        text_start: position of the first text token, default S; positions from S to there are zeros.
        order: in which heads take the video tokens, whose grid has S; rotary angles belong to raster tokens.
        options: `backend` "auto", "triton" or "torch"; a library for attention is as "auto". Nothing else is read.

    Returns:
        q and k [B, L, H, D], contiguous, in the dtype of the projections; L is S, or text_start + T.

    Raises:
        ValueError: shapes, devices, strides or an eps that do not fit.
        TypeError: dtypes that differ or are not supported; an argument of another type.
        RuntimeError: a gradient would be needed; or options.backend is "triton", which cannot run here.
    """
    check_options(options)
    check_whole("heads", heads)
    _check_stream("video", video, heads, video)
    tokens = video.q.shape[1]
    if text is not None:
        _check_stream("text", text, heads, video)
    if text_start is None:
        text_start = tokens
    else:
        check_whole("text_start", text_start, 0)
        if text is None or text_start < tokens:
            raise ValueError(f"text_start must come after the {tokens} video tokens, with text (got {text_start}).")
    if rotary is not None:
        _check_rotary(rotary, video.q, heads)
    _check_gradient([video, *([] if text is None else [text])], rotary)
    cos, sin = (None, None) if rotary is None else rotary
    steps = () if order is None else _steps(order, heads, video.q)
    of_text = (None, None, None, None, 1.0)
    if text is not None:
        of_text = (text.q, text.k, text.q_weight, text.k_weight, text.eps)  # type: ignore[assignment]
    found: Pair = norm_rotate_forward(
        video.q, video.k, video.q_weight, video.k_weight, video.eps, *of_text, cos, sin, heads, text_start,
        own_backend(options.backend), *steps,
    )  # fmt: skip
    return found


def _steps(order: AnyOrder, heads: int, q: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """What the op is given of an order for q [B, S, H * D]."""
    check_is_order(order)
    if order.grid.tokens != q.shape[1]:
        raise ValueError(f"The order is for {order.grid.tokens} video tokens, video.q has {q.shape[1]}.")
    steps = steps_of(order, heads, order.grid, q.device)
    return steps.table, steps.height, steps.width


def _check_stream(name: str, stream: Stream, heads: int, model: Stream) -> None:
    """Raise unless a stream is one, well formed, and goes with the video's."""
    if not isinstance(stream, Stream):
        raise TypeError(f"{name} must be a Stream (got {shown(stream)}); pass Stream(q, k, q_weight, k_weight, eps).")
    for other in ("q", "k", "q_weight", "k_weight"):
        check_tensor(f"{name}.{other}", getattr(stream, other), "")
    check_number(f"{name}.eps", stream.eps)
    q, k = stream.q, stream.k
    if q.dim() != 3 or q.shape[2] % heads:
        raise ValueError(f"{name}.q must be [batch, tokens, {heads} heads * head_dim] (got {list(q.shape)}).")
    if k.shape != q.shape or q.shape[0] != model.q.shape[0] or q.shape[2] != model.q.shape[2]:
        raise ValueError(
            f"{name}.q and {name}.k must have one shape, and batch and width of video.q {list(model.q.shape)} "
            f"(got {list(q.shape)} and {list(k.shape)})."
        )
    head_dim = q.shape[2] // heads
    if row_width(heads, head_dim) > MAX_WIDTH:
        raise ValueError(f"heads * head_dim must be at most {MAX_WIDTH} (got {heads} * {head_dim}).")
    if q.dtype not in DTYPES:
        raise TypeError(f"{name}.q must be float16, bfloat16, float32 or float64 (got {q.dtype}); cast it.")
    if not stream.eps > 0:
        raise ValueError(f"{name}.eps must be above 0 (got {stream.eps}).")
    for other, x in (("q", q), ("k", k)):
        if x.dtype != model.q.dtype:
            raise TypeError(f"{name}.{other} must have the dtype of video.q, {model.q.dtype} (got {x.dtype}).")
        if x.device != model.q.device:
            raise ValueError(f"{name}.{other} must be on {model.q.device} like video.q (got {x.device}); move it.")
        if x.stride(2) != 1:
            raise ValueError(
                f"{name}.{other} must be contiguous along its last dimension (got strides {list(x.stride())}); "
                "call .contiguous() on it."
            )
    for other, weight in (("q_weight", stream.q_weight), ("k_weight", stream.k_weight)):
        if weight.dim() != 1 or weight.shape[0] not in (head_dim, q.shape[2]) or weight.shape != stream.q_weight.shape:
            raise ValueError(
                f"{name}.{other} must be [{q.shape[2]}] (across heads) or [{head_dim}] (per head), like the other "
                f"weight (got {list(weight.shape)})."
            )
        if weight.dtype not in DTYPES:
            raise TypeError(f"{name}.{other} must be float16, bfloat16, float32 or float64 (got {weight.dtype}).")
        if weight.device != q.device or weight.stride(0) != 1:
            raise ValueError(
                f"{name}.{other} must be contiguous on {q.device} (got {weight.device}, stride {weight.stride(0)})."
            )


def _check_rotary(rotary: Pair, q: torch.Tensor, heads: int) -> None:
    """Raise unless cos and sin [S, 1 or H, D / 2] fit q [B, S, H * D]."""
    tokens, pairs = q.shape[1], q.shape[2] // heads / 2
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair of tensors (cos, sin), or None (got {shown(rotary)}).")
    for name, x in zip(("cos", "sin"), rotary, strict=True):
        check_tensor(f"rotary {name}", x, " [tokens, 1 or heads, head_dim / 2]")
        if x.dim() != 3 or x.shape != rotary[0].shape or x.shape[0] != tokens or x.shape[1] not in (1, heads):
            raise ValueError(
                f"rotary {name} must be [{tokens} tokens, 1 or {heads} heads, head_dim / 2] (got {list(x.shape)})."
            )
        if x.shape[2] != pairs:
            raise ValueError(f"rotary {name} must hold head_dim / 2 = {pairs:g} angles (got {x.shape[2]}).")
        if x.dtype not in DTYPES:
            raise TypeError(f"rotary {name} must be float16, bfloat16, float32 or float64 (got {x.dtype}).")
        if x.device != q.device:
            raise ValueError(f"rotary {name} must be on {q.device} like video.q (got {x.device}); move it there once.")


def _check_gradient(streams: list[Stream], rotary: Pair | None) -> None:
    """Raise where autograd would want a gradient."""
    tensors = [x for s in streams for x in (s.q, s.k, s.q_weight, s.k_weight)] + list(rotary or ())
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            "norm_rotate has no gradient, and one of its inputs requires one; call it under torch.no_grad(), or norm "
            "and rotate step by step."
        )
