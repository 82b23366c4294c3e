"""Which Triton kernel runs an operation: on Hopper the one made for it, where it takes the call, else the portable one.

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
        hopper: the module with the special kernel for Hopper.
        title: what that kernel is called in messages.
        portable: the module with the kernel for every GPU, and for Triton's interpreter.
    """

    function: str
    hopper: str
    title: str
    portable: str


OPERATIONS = {
    "attend": Operation("forward", "hopper_forward", "Hopper kernel in Gluon", "triton_forward"),
    "integer attention": Operation("forward", "hopper_int8", "Hopper kernel in Gluon", "triton_int8"),
    "gradients of attend": Operation("backward", "hopper_backward", "Hopper kernels", "triton_backward"),
    "block_sums": Operation("block_sums", "hopper_sums", "Hopper kernel in Gluon", "triton_sums"),
}

_portable_only = False
_failed: set[tuple[str, torch.device]] = set()
"""Operations whose special kernel did not compile, and where."""


@contextmanager
def portable_only() -> Iterator[None]:
    """Do without the special kernels, for tests and benchmarks of the portable ones."""
    global _portable_only
    before, _portable_only = _portable_only, True
    try:
        yield
    finally:
        _portable_only = before


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether special kernels are made for a device."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def special_kernel(name: str, device: torch.device) -> ModuleType | None:
    """The module with an operation's special kernel; None where the portable one runs: on other cards, or since this
    Triton does not import or compile it, as far as was tried."""
    if _portable_only or not is_hopper(device) or (name, device) in _failed:
        return None
    return _import(name)


@cache
def _import(name: str) -> ModuleType | None:
    """A module, None where it fails: Gluon is an experimental part of Triton. Cached, so that it is said once."""
    try:
        return importlib.import_module(f"videosparse.kernels.{OPERATIONS[name].hopper}")
    except Exception as error:
        _warn(name, f"cannot be imported: {type(error).__name__}: {error}")
        return None


def special_title(device: torch.device, name: str = "attend") -> str | None:
    """What the special kernel of an operation that runs here is called; None where the portable one does."""
    known = name in OPERATIONS and special_kernel(name, device) is not None
    return OPERATIONS[name].title if known else None


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one: kernels start on the current device's stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _run(name: str, device_of: torch.Tensor, *arguments: Any) -> Any:
    """An operation on checked tensors, by the special kernel where it runs and takes the call, else by the portable."""
    operation, device = OPERATIONS[name], device_of.device
    with on_device(device_of):
        special = special_kernel(name, device)
        if special is not None and _takes(name, special, arguments):
            try:
                return getattr(special, operation.function)(*arguments)
            except CannotCompile as error:
                _failed.add((name, device))
                _warn(name, f"cannot be compiled: {error}")
        portable = importlib.import_module(f"videosparse.kernels.{operation.portable}")
        return getattr(portable, operation.function)(*arguments)


def _takes(name: str, special: ModuleType, arguments: tuple[Any, ...]) -> bool:
    reason = special.unsuited(*arguments)
    if reason is not None:
        _tell(name, reason)
    return reason is None


@cache
def _tell(name: str, reason: str) -> None:
    """Cached, so that a reason is logged once."""
    logger.info("%s does not take its %s: %s.", name, OPERATIONS[name].title, reason)


def _warn(name: str, what: str) -> None:
    logger.warning(
        "%s does without its %s, and is slower: it %s. Triton 3.6 to 3.9 are known to work.",
        name, OPERATIONS[name].title, what,
    )  # fmt: skip


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
