"""The kernels that are compared: each turns a `Problem` into a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from videosparse.benchmark.problems import Problem, radial
from videosparse.kernels import KernelOptions, attend, block_sums, gpu
from videosparse.kernels.dense import DENSE_KERNELS

Call = Callable[[], Any]

INTEGERS = ("int8", "int8-fp8", "int8-int8")
"""Contenders that round: ours, each with the quantization of its inputs in every call."""

QUANTIZE = {f"quantize {name}": name for name in ("int8", "int8-fp8")}
"""Contenders that only round, as the kernel that runs here wants its inputs, and what they do it for."""


class Missing(RuntimeError):
    """A peer that cannot run, and why."""


def _dense(name: str, p: Problem) -> Call:
    if p.block_map is not None:
        raise Missing("it reads no block lists")
    kernel = DENSE_KERNELS[name]
    if reason := kernel.unsuited(p.q):
        raise Missing(reason)
    if p.q.requires_grad and not kernel.gradients:
        raise Missing("it has no backward pass")
    return lambda: kernel.attend(*p.qkv, p.q.shape[3] ** -0.5)


def _ours(p: Problem, backend: str = "triton", quant: str | None = None) -> Call:
    index, options = p.index, KernelOptions(backend=backend, quant=quant)
    return lambda: attend(*p.qkv, layout=p.layout, index=index, options=options)


def _quantize(p: Problem, quant: str) -> Call:
    from videosparse.kernels import backend, int8_path

    where = p.q.device, p.q.dtype
    if reason := backend.unavailable("triton", *where) or int8_path.unavailable(quant, *where, p.q.shape[3]):
        raise Missing(reason)
    from videosparse.kernels.quantize import quantize

    call, values, reorder = p.call, int8_path.values_of(quant), in_key_order(p)

    def run() -> Any:
        with gpu.on_device(p.q):
            return quantize(*p.qkv, call, False, values, reorder)

    return run


def in_key_order(p: Problem) -> bool:
    """Whether the kernel that runs integer attention here reads FP8 values in `quantize.KEY_ORDER`."""
    special = gpu.special_kernel("integer attention", p.q.device)
    return special is not None and special.unsuited(*p.qkv, p.call, False, "fp8") is None


def _portable(p: Problem) -> Call:
    run = _ours(p)

    def call() -> Any:
        with gpu.portable_only():
            return run()

    return call


def _fa4(p: Problem) -> Call:
    from videosparse.kernels import fa4_path
    from videosparse.kernels.libraries import import_library

    if p.block_map is None:
        return _dense("fa4", p)
    if reason := fa4_path.missing(p.q.device) or fa4_path.unsuited(p.q, p.call):
        raise Missing(reason)
    lists, other = fa4_path.block_sparse(p.call, p.k.shape[1]), None
    if p.q.requires_grad:
        columns = replace(p, block_map=p.block_map.transpose())
        other = fa4_path.block_sparse(columns.call, p.q.shape[1])._replace(block_size=p.entry.block)
    run = partial(import_library("flash_attn.cute")[0].flash_attn_func, *p.qkv)
    return lambda: run(block_sparse_tensors=lists, block_sparse_tensors_bwd=other)[0]


def _flex(p: Problem) -> Call:
    from videosparse.kernels import flex_path

    if reason := flex_path.missing(p.q.device) or flex_path.unsuited(p.q, p.call):
        raise Missing(reason)
    call = p.call
    return lambda: flex_path.forward(*p.qkv, call, False)[0]


def _sums(p: Problem) -> Call:
    _, lse = attend(*p.qkv, layout=p.layout, return_lse=True)
    return lambda: block_sums(p.q, p.k, lse, layout=p.layout, block=p.entry.block)


def _index(p: Problem) -> Call:
    """Map and lists of Radial Attention; the decay differs each time, so that nothing comes from a cache."""
    policy, serial = radial(p.workload.name, p.entry.block), iter(range(10**9))
    return lambda: replace(policy, decay=policy.decay * (1 + 1e-9 * next(serial))).block_index(p.layout, p.q.device)


CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    "ours": _ours, "portable": _portable, "fa4": _fa4, "flex": _flex, "block_sums": _sums, "index": _index,
    **{name: partial(_dense, name) for name in ("fa3", "cudnn", "fa2")},
    **{name: partial(_ours, quant=name) for name in INTEGERS},
    **{name: partial(_quantize, quant=quant) for name, quant in QUANTIZE.items()},
}  # fmt: skip
