"""Which backend runs: what each one needs, and what is said about it."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

from videosparse.checking import check_device
from videosparse.kernels.gpu import special_title
from videosparse.kernels.options import own_backend

logger = logging.getLogger("videosparse")

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_missing(device: torch.device) -> str | None:
    """What keeps Triton kernels from running on a device; None when nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton; triton-windows on Windows)"
    if device.type != "cuda":
        return f"it needs CUDA or ROCm tensors (got {device.type})"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm GPU is available"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer (got {major}.{minor})"
    return None


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the Triton kernels from running on tensors of this device and dtype; None when nothing does."""
    if dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32 (got {dtype})"
    return _triton_missing(device)


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a backend from running on tensors of this device and dtype; None when nothing does.

    Args:
        backend: one of `options.BACKENDS`; "auto" and "torch" always run.
    """
    if backend == "triton":
        return None if interpreted() and device.type == "cpu" else missing(device, dtype)
    if backend == "fa4":
        from videosparse.kernels import fa4_path

        return fa4_path.missing(device)
    if backend == "flex":
        from videosparse.kernels import flex_path

        return flex_path.missing(device)
    return None


def _device_name(device: torch.device, operation: str = "attend") -> str:
    if torch.version.hip is not None:
        return f"ROCm on {torch.cuda.get_device_name(device)}"
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    kernel = special_title(device, operation)
    return name if kernel is None else f"{name}, {kernel}"


def describe_backend(device: torch.device | str) -> tuple[str, str]:
    """What backend="auto" takes for 16- and 32-bit tensors on a device.

    Args:
        device: such as "cuda", "cuda:1" or "cpu". A GPU is asked for its capability, which initialises CUDA.

    Returns:
        ("triton" or "torch", why): one line each, for people.

    Raises:
        TypeError, ValueError: device is none, and names none.
    """
    device = check_device(device)
    reason = _triton_missing(device)
    return ("triton", _device_name(device)) if reason is None else ("torch", f"no Triton: {reason}")


@cache
def _take_automatically(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" means for a device and dtype; cached, so that it is logged once."""
    reason = missing(device, dtype)
    name, why = ("triton", _device_name(device, operation)) if reason is None else ("torch", f"no Triton: {reason}")
    logger.info("%s takes the %s backend for %s on %s: %s.", operation, name, dtype, device, why)
    return name


def choose_own(backend: str, device: torch.device, dtype: torch.dtype, operation: str) -> str:
    """ "triton" or "torch" for what libraries of attention do not do: asked for one of them, as "auto"."""
    return choose(own_backend(backend), device, dtype, operation)


def choose(backend: str, device: torch.device, dtype: torch.dtype, operation: str = "attend") -> str:
    """The backend that runs a call of an operation: "triton" or "torch", or the library that was asked for.

    Raises:
        RuntimeError: an explicit backend cannot run; the message says what is missing.
    """
    if backend == "auto":
        return _take_automatically(operation, device, dtype)
    reason = unavailable(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot run here: {reason}. Use backend="auto" or "torch".')
    return backend
