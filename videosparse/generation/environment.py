"""What this machine has: versions, devices, memory; for sidecars and `videosparse doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from dataclasses import dataclass

import torch

from videosparse.generation.errors import GenerationError
from videosparse.kernels import describe_backend

PACKAGES = (
    "videosparse",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
    "imageio",
    "av",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A device that videos can be made on.

    Args:
        device: how PyTorch calls it.
        name: what the hardware calls itself.
        memory: bytes it has, None where the system does not say.
        capability: of an NVIDIA GPU, such as "9.0"; "" elsewhere.
        backend, reason: the attention kernels that backend="auto" takes on it, and why.
    """

    device: str
    name: str
    memory: int | None
    capability: str
    backend: str
    reason: str


def devices() -> list[Device]:
    """The CPU and every GPU."""
    found = [Device("cpu", device_name(torch.device("cpu")), _system_memory(), "", *describe_backend("cpu"))]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Device(name, properties.name, properties.total_memory, capability, *describe_backend(name)))
    return found


def _system_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def versions() -> dict[str, str | None]:
    """Installed versions of Python and of what a video depends on; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the first NVIDIA GPU, else the CPU.

    Raises:
        GenerationError: an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise GenerationError(f"Unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda":
        _check_cuda(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise GenerationError("device mps needs an Apple GPU, and PyTorch sees none; use --device cpu.")
    elif device.type != "cpu":
        raise GenerationError(f"Unsupported device {name!r}; use auto, cpu, cuda, cuda:N or mps.")
    return device


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        build = "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch sees none"
        raise GenerationError(f"device {device} needs an NVIDIA GPU, and {build}; use --device cpu.")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise GenerationError(f"device {device} does not exist: this machine has {count} (cuda:0..{count - 1}).")


def choose_dtype(name: str, device: torch.device) -> str:
    """The name of the precision to run in: "auto" is bf16 where the GPU has it, else fp32.

    Raises:
        GenerationError: an unknown name, or one that the device cannot run well.
    """
    on_cuda = device.type == "cuda"
    has_bf16 = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    if name not in DTYPES:
        raise GenerationError(f"Unknown dtype {name!r}; use auto, {', '.join(DTYPES)}.")
    if name == "fp16" and device.type == "cpu":
        raise GenerationError("fp16 is slow and inexact on a CPU; use --dtype fp32 or bf16.")
    if name == "bf16" and on_cuda and not has_bf16:
        raise GenerationError("bf16 needs a GPU of compute capability 8.0 or newer; use --dtype fp32.")
    return name


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new maximum on a GPU; a process's maximum on the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most allocated on the GPU since the reset, weights included; on the CPU the most resident memory of
    this process since it started; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
