"""Which Triton kernel runs an operation: on Hopper those made for it, where they take the call, else the portable one.

A special kernel is a module of this package with two functions of the same arguments: the operation itself, and
`unsuited`, which says what of a call it does not take. One that does not import or compile is named once in a warning
and not tried again; what it does not take is logged once for each reason.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from videosparse.kernels.call import AttentionCall, Lists
from videosparse.kernels.compiled import CannotCompile

logger = logging.getLogger("videosparse")

MOST_ORDERED = 2**20
"""Video tokens up to which kernels write a token order back themselves: they divide positions in fp32, exactly up to
there."""


@dataclass(frozen=True)
class Operation:
    """The kernels of one operation.

    Args:
        function: its name in each of the modules.
        hopper: modules with special kernels, the best first, and what they are called in messages.
        portable: the module with the kernel for every GPU, and for Triton's interpreter.
    """

    function: str
    hopper: dict[str, str]
    portable: str


OPERATIONS = {
    "attend": Operation(
        "forward",
        {"hopper_forward": "Hopper kernel in Gluon", "specialized_forward": "specialized Hopper kernel"},
        "triton_forward",
    ),
    "integer attention": Operation("forward", {"hopper_int8": "Hopper kernel in Gluon"}, "triton_int8"),
    "gradients of attend": Operation("backward", {"hopper_backward": "Hopper kernels"}, "triton_backward"),
    "block_sums": Operation("block_sums", {"hopper_sums": "Hopper kernel in Gluon"}, "triton_sums"),
}

_left_out: frozenset[str] = frozenset()
_failed: set[tuple[str, torch.device]] = set()
"""Modules whose kernel did not compile, and where."""


@contextmanager
def leave_out(*modules: str) -> Iterator[None]:
    """Do without some special kernels, for tests and benchmarks of the others."""
    global _left_out
    before, _left_out = _left_out, _left_out | set(modules)
    try:
        yield
    finally:
        _left_out = before


def portable_only() -> AbstractContextManager[None]:
    """Do without all special kernels."""
    return leave_out(*(name for operation in OPERATIONS.values() for name in operation.hopper))


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether special kernels are made for a device."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def special_kernels(name: str, device: torch.device) -> list[tuple[str, ModuleType]]:
    """(title, module) of each special kernel for an operation that may run on a device, the best first."""
    if not is_hopper(device):
        return []
    usable = []
    for module, title in OPERATIONS[name].hopper.items():
        if module not in _left_out and (module, device) not in _failed:
            found = _import(name, module, title)
            usable += [] if found is None else [(title, found)]
    return usable


@cache
def _import(name: str, module: str, title: str) -> ModuleType | None:
    """A module, None where it fails: Gluon is an experimental part of Triton. Cached, so that it is said once."""
    try:
        return importlib.import_module(f"videosparse.kernels.{module}")
    except Exception as error:
        _warn(name, title, f"cannot be imported: {type(error).__name__}: {error}")
        return None


def runs_hopper(device: torch.device) -> bool:
    """Whether the fastest kernel for Hopper runs here: on this card, and with this Triton as far as was tried."""
    return best_kernel(device) == next(iter(OPERATIONS["attend"].hopper.values()))


def best_kernel(device: torch.device, name: str = "attend") -> str | None:
    """What an operation's best special kernel that runs here is called; None where there is the portable one only."""
    return next((title for title, _ in special_kernels(name, device)), None)


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one: kernels start on the current device's stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _run(name: str, device_of: torch.Tensor, *arguments: Any) -> Any:
    """An operation on checked tensors, by the first kernel that takes the call."""
    operation, device = OPERATIONS[name], device_of.device
    with on_device(device_of):
        for title, module in special_kernels(name, device):
            reason = module.unsuited(*arguments)
            if reason is not None:
                _tell(name, title, reason)
                continue
            try:
                return getattr(module, operation.function)(*arguments)
            except CannotCompile as error:
                _failed.add((module.__name__.rpartition(".")[2], device))
                _warn(name, title, f"cannot be compiled: {error}")
        portable = importlib.import_module(f"videosparse.kernels.{operation.portable}")
        return getattr(portable, operation.function)(*arguments)


@cache
def _tell(name: str, title: str, reason: str) -> None:
    """Cached, so that a reason is logged once."""
    logger.info("%s does not take its %s: %s.", name, title, reason)


def _warn(name: str, title: str, what: str) -> None:
    logger.warning(
        "%s does without its %s, and is slower: it %s. Triton 3.6 to 3.9 are known to work.", name, title, what
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of checked tensors [B, L, H, D] on a GPU, or on the CPU where Triton interprets.

    Returns:
        out [B, L, H, D] contiguous in the dtype of q, and lse fp32 [B, H, L], which is empty unless `need_lse`.
    """
    return _run("attend", q, q, k, v, call, need_lse)  # type: ignore[no-any-return]


def integer_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, need_lse: bool, values: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` with INT8 queries and keys, of tensors with at least one element; `values` as in `quantize`."""
    return _run("integer attention", q, q, k, v, call, need_lse, values)  # type: ignore[no-any-return]


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    by_key: Lists | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`, deterministic to the bit.

    Args:
        grad: of the output, [B, L, H, D], any strides.
        grad_lse: [B, H, L], or None when lse took no part.
        q, k, v: as the forward got them.
        out, lse: as the forward returned them, lse fp32 [B, H, L].
        call: geometry, and the query-major lists.
        by_key: the key-major lists of the same map; None without lists.

    Returns:
        dq, dk, dv, [B, L, H, D] contiguous in the dtype of q; 0 at positions that are no valid token.
    """
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return _run("gradients of attend", q, grad, grad_lse, q, k, v, out, lse, call, by_key)  # type: ignore[no-any-return]


def block_sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, call: AttentionCall, block: tuple[int, int]
) -> torch.Tensor:
    """Attention mass of every block, fp32 [B, H, Mq, Nk]; see `kernels.block_sums`."""
    return _run("block_sums", q, q, k, lse, call, block)  # type: ignore[no-any-return]
