"""What `attend` and `block_sums` refuse, and what they say about it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from videosparse.blocks import BlockIndex, BlockMap, PackedIndex
from videosparse.checking import check_scale, check_tensor, shown
from videosparse.kernels.backend import TRITON_DTYPES
from videosparse.kernels.options import KernelOptions
from videosparse.layout import TokenLayout, ceil_div, check_is_layout

HEAD_DIMS = (8, 128)
SAMPLES = (8, 16, 32, 64)
DTYPES = (*TRITON_DTYPES, torch.float64)


def check_tensors(tensors: dict[str, torch.Tensor], layout: TokenLayout) -> None:
    """Raise unless the named tensors are alike, [B, L, H, D], and fit the layout; the first one is the model."""
    for name, x in tensors.items():
        check_tensor(name, x, " [batch, length, heads, head_dim]")
    name, first = next(iter(tensors.items()))
    if first.dim() != 4:
        raise ValueError(f"{name} must be [batch, length, heads, head_dim] (got {list(first.shape)}).")
    for other, x in tensors.items():
        if x.shape != first.shape:
            raise ValueError(
                f"{other} must have the shape of {name}, {list(first.shape)} (got {list(x.shape)}); "
                "repeat shared key and value heads first."
            )
        if x.dtype != first.dtype:
            raise TypeError(f"{other} must have the dtype of {name}, {first.dtype} (got {x.dtype}); cast one of them.")
        if x.device != first.device:
            raise ValueError(f"{other} must be on {first.device} like {name} (got {x.device}); move it there.")
        if x.stride(3) != 1:
            raise ValueError(
                f"{other} must be contiguous along head_dim (got strides {list(x.stride())}); "
                "call .contiguous() on it, or transpose only other dimensions."
            )
    if first.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64 (got {first.dtype}); cast it.")
    if not HEAD_DIMS[0] <= first.shape[3] <= HEAD_DIMS[1]:
        raise ValueError(
            f"head_dim must be {HEAD_DIMS[0]}..{HEAD_DIMS[1]} (got {first.shape[3]}); keep this model dense."
        )
    check_layout(first, layout)


def check_layout(q: torch.Tensor, layout: TokenLayout) -> None:
    """Raise unless the layout is one, for these tensors [B, L, H, D]."""
    check_is_layout(layout)
    if q.shape[1] != layout.length:
        raise ValueError(
            f"The layout has {layout.length} tokens (grid {layout.grid}, text {layout.text} from {layout.text_start}), "
            f"the tensors have {q.shape[1]}; make the layout from this call's sequence."
        )
    layout.check_batch(q.shape[0])
    if layout.seq_lens is not None and layout.seq_lens.device != q.device:
        raise ValueError(
            f"layout.seq_lens must be on {q.device} like the tensors (got {layout.seq_lens.device}); "
            "move it there once, outside the model."
        )


def check_index(q: torch.Tensor, index: BlockIndex) -> None:
    """Raise unless the index is one, for these tensors [B, L, H, D]."""
    if not isinstance(index, BlockIndex):
        instead = "leave it out for dense attention"
        if isinstance(index, BlockMap):
            instead = "pass map.index()"
        elif isinstance(index, PackedIndex):
            instead = "pass kernels.selection.expand(index)"
        raise TypeError(f"index must be a BlockIndex or None (got {shown(index)}); {instead}.")
    index.check_geometry()
    batch, length, heads, _ = q.shape
    if index.q_len != length or index.kv_len != length:
        raise ValueError(
            f"The block index is for {index.q_len} x {index.kv_len} tokens, the tensors have {length}; "
            "build the map from the same layout."
        )
    samples, map_heads, rows, cols = index.shape
    if samples not in (1, batch) or map_heads not in (1, heads):
        raise ValueError(
            f"The block index is for {samples} samples and {map_heads} heads, the tensors have {batch} and {heads}; "
            "each must be equal, or 1 for a shared map."
        )
    if (rows, cols) != (ceil_div(length, index.block[0]), ceil_div(length, index.block[1])):
        raise ValueError(
            f"The block index has {rows} x {cols} blocks, {length} tokens in blocks of {index.block} need "
            f"{ceil_div(length, index.block[0])} x {ceil_div(length, index.block[1])}; build it with BlockMap.index()."
        )
    index.check()
    if index.row_ptr.device != q.device:
        raise ValueError(f"BlockIndex must be on {q.device} like q (got {index.row_ptr.device}); build it there.")


def check_sample(sample: int | None) -> None:
    """Raise ValueError unless `sample` rows, evenly spread, can stand for a block of 64 or 128."""
    if sample is not None and (type(sample) is not int or sample not in SAMPLES):
        raise ValueError(
            f"sample must be one of {', '.join(map(str, SAMPLES))} rows of a block, or None for all (got {sample!r})."
        )


def check_lse(q: torch.Tensor, lse: torch.Tensor) -> None:
    """Raise unless lse is float [B, H, L] beside q [B, L, H, D]."""
    expected = (q.shape[0], q.shape[2], q.shape[1])
    check_tensor("lse", lse, ", as attend(return_lse=True) gives it")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be float32, as attend(return_lse=True) gives it (got {lse.dtype}).")
    if tuple(lse.shape) != expected:
        raise ValueError(f"lse must be [batch, heads, length] = {list(expected)} (got {list(lse.shape)}).")
    if lse.device != q.device:
        raise ValueError(f"lse must be on the device of q, {q.device} (got {lse.device}); move it there.")


def check_options(options: KernelOptions) -> None:
    """Raise TypeError unless options are `KernelOptions`."""
    if not isinstance(options, KernelOptions):
        instead = f"pass KernelOptions(backend={options!r})" if isinstance(options, str) else "or leave them out"
        raise TypeError(f"options must be KernelOptions (got {shown(options)}); {instead}.")


def check_no_tangents(tensors: dict[str, torch.Tensor]) -> None:
    """Raise NotImplementedError where forward-mode differentiation would want a tangent of the result."""
    if torch.compiler.is_compiling():  # which has no forward mode
        return
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"attend has no forward-mode derivative, and {name} has a tangent (torch.func.jvp); take gradients "
                "backward, or use attention_reference."
            )


def scale_of(q: torch.Tensor, scale: float | None) -> float:
    """The factor of the scores of q [B, L, H, D]: `scale`, else D ** -0.5.

    Raises:
        TypeError: it is no number.
        ValueError: it is nan or infinite.
    """
    if scale is None:
        return float(q.shape[3] ** -0.5)
    check_scale(scale)
    return float(scale)
