"""Kernels compiled before they are launched: one that this Triton cannot compile is told from one that fails."""

from __future__ import annotations

from typing import Any

import torch


class CannotCompile(RuntimeError):
    """A kernel does not compile, or does not load: this Triton is not one that it was written for."""


KEPT: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by kernel and key."""


def compiled(kernel: Any, key: tuple[Any, ...], *arguments: Any, **options: Any) -> Any:
    """A kernel compiled for these arguments, and loaded on the current device, once for each `key`.

    Args:
        kernel: a function of Triton or Gluon.
        key: all that its binary depends on: device, dtypes, compile-time arguments.
        arguments, options: what it would be launched with.

    Returns:
        What is launched by `[grid](*arguments)`, without a look at the arguments. None where Triton interprets.

    Raises:
        CannotCompile: what it says.
    """
    key = (kernel, *key)
    if key not in KEPT:
        try:
            made = kernel.warmup(*arguments, grid=(1,), **options)
            if made is not None:
                made[(1, 1, 1)]  # loads it, and launches nothing
        except Exception as error:
            if torch.cuda.is_current_stream_capturing():  # which may forbid loading: that says nothing about Triton
                raise
            raise CannotCompile(f"{type(error).__name__}: {str(error).strip()[-300:]}") from error
        KEPT[key] = made
    return KEPT[key]
