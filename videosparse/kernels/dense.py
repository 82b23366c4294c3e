"""Dense attention kernels of other libraries: which are here, how they are called, and which is the fastest.

Shapes: q, k, v and out [B, L, H, D], every token valid: none of these kernels is given a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from videosparse.kernels import fa4_path, gpu
from videosparse.kernels.libraries import import_library

logger = logging.getLogger("videosparse")


@dataclass(frozen=True)
class DenseKernel:
    """A dense kernel of another library.

    Args:
        title: how reports and tables call it.
        gradients: whether autograd goes through it.
        dtypes: that it takes.
        missing: what keeps it from running on a device; None when nothing does.
        attend: (q, k, v, scale) -> out.
    """

    title: str
    gradients: bool
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[torch.device], str | None]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

    def unsuited(self, q: torch.Tensor) -> str | None:
        """Why it cannot take a call on q [B, L, H, D]; None when it can."""
        if q.dtype not in self.dtypes:
            return f"it takes {', '.join(str(d) for d in self.dtypes)} (got {q.dtype})"
        if q.shape[3] not in (64, 128):
            return f"head_dim must be 64 or 128 (got {q.shape[3]})"
        return self.missing(q.device)


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


def _no_cuda(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU (got {device.type})"
    return None


def _no_cudnn(device: torch.device) -> str | None:
    found = _no_cuda(device)
    if found is None and not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call, unused-ignore]
        found = "this PyTorch has no cuDNN"
    return found


FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
"""Where FlashAttention-3 is found: built from source, or the forward-only wheel `fa3-fwd`."""


def _fa3() -> tuple[Any, str | None]:
    reasons = []
    for name in FA3_MODULES:
        module, reason = import_library(name)
        if reason is None:
            return module, None
        reasons.append(reason)
    return None, "; ".join(reasons)


def _no_fa3(device: torch.device) -> str | None:
    found = _no_cuda(device)
    if found is None and torch.cuda.get_device_capability(device)[0] != 9:
        found = "FlashAttention-3 is for Hopper"
    if found is None and (reason := _fa3()[1]) is not None:
        found = f"FlashAttention-3 is not usable (pip install fa3-fwd): {reason}"
    return found


def _attend_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out = _fa3()[0].flash_attn_func(q, k, v, softmax_scale=scale)
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _attend_fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out: torch.Tensor = import_library("flash_attn.cute")[0].flash_attn_func(q, k, v, softmax_scale=scale)[0]
    return out


_HALF = (torch.float16, torch.bfloat16)

DENSE_KERNELS: dict[str, DenseKernel] = {
    "fa3": DenseKernel("FlashAttention-3", False, (torch.bfloat16,), _no_fa3, _attend_fa3),
    "fa4": DenseKernel("FlashAttention-4", True, _HALF, fa4_path.missing, _attend_fa4),
    "cudnn": DenseKernel("cuDNN", True, _HALF, _no_cudnn, partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    "fa2": DenseKernel("FlashAttention-2", True, _HALF, _no_cuda, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
}
"""By the name that rows of benchmarks use. The wheel of FlashAttention-3 takes bfloat16 and has no backward."""

OWN = "videosparse"
"""Name of our kernel among the dense ones."""

FASTEST: dict[tuple[tuple[int, int], int], tuple[str, ...]] = {((9, 0), 128): ("fa3", "fa4", OWN)}
"""By (compute capability, head_dim): the kernels that were measured to be faster than torch's own attention, which is
cuDNN there, the fastest first (assets/results/attention.csv). Where nothing was measured, torch's own is taken."""

SHORTEST = 8192
"""Tokens below which torch's own is taken: there a call lasts about as long as starting it."""


def fastest_dense(device: torch.device, dtype: torch.dtype, head_dim: int, length: int) -> str | None:
    """The kernel to take for dense calls without a mask and without gradients.

    Args:
        device, dtype, head_dim, length: of q.

    Returns:
        A name of `DENSE_KERNELS`, or `OWN`; None for torch's own attention.
    """
    if length < SHORTEST:
        return None
    name = _fastest(device, dtype, head_dim)
    # its portable stand-in, where Triton could not compile it, is slower than torch's own
    return None if name == OWN and gpu.special_kernel("attend", device) is None else name


@cache
def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Cached, so that it is logged once."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in _HALF:
        return None
    candidates = FASTEST.get((torch.cuda.get_device_capability(device), head_dim), ())
    passed: list[str] = []
    for name in candidates:
        reason = _unusable(name, device, dtype)
        if reason is None:
            better = f" ({'; '.join(passed)})" if passed else ""
            logger.info("Dense attention in %s takes %s%s.", dtype, title_of(name), better)
            return name
        passed.append(f"not {title_of(name)}: {reason}")
    if candidates:
        logger.info("Dense attention in %s takes torch's own (%s).", dtype, "; ".join(passed))
    return None


def _unusable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == OWN:  # of our kernels only the one for Hopper is faster than torch's own
        return None if gpu.special_kernel("attend", device) else "its kernel for Hopper does not run here"
    kernel = DENSE_KERNELS[name]
    return kernel.missing(device) if dtype in kernel.dtypes else f"it does not take {dtype}"


def title_of(name: str) -> str:
    """How reports call a kernel of `DENSE_KERNELS`, or `OWN`."""
    return "videosparse triton" if name == OWN else DENSE_KERNELS[name].title


@torch.library.custom_op(
    "videosparse::dense_by_library", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, str name) -> Tensor"
)
def dense_by_library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    """Dense attention [B, L, H, D] by a kernel of `DENSE_KERNELS`; one node in a compiled graph, no gradients."""
    with gpu.on_device(q):
        out = DENSE_KERNELS[name].attend(q, k, v, q.shape[3] ** -0.5)
    return out.contiguous()


@dense_by_library.register_fake
def _dense_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    return q.new_empty(q.shape)
