"""What takes part in the benchmark of whole models: attention, numbers, linear layers, compilation, a step cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from videosparse import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor, restore, sparsify
from videosparse.attach import tracker_of
from videosparse.benchmark.contenders import Missing
from videosparse.benchmark.transformer import compile_blocks, run_eagerly
from videosparse.cases import Case
from videosparse.kernels import attend
from videosparse.kernels.dense import DENSE_KERNELS, OWN
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.processors import DensePlan, Processor

STEPS = 50
"""Of a run."""

BEST = "best"
"""The dense kernel that is the fastest at a case, by `fastest_kernel`."""

CHOICE_TOKENS = 75_600
"""`fastest_kernel` looks at no more tokens: rates of dense kernels no longer change there."""

SKIP_ALWAYS = 1e9
"""A threshold of FirstBlockCache under which every step but the first is skipped."""


@dataclass(frozen=True)
class StepContender:
    """One way to make a denoising step.

    Args:
        name: in rows.
        title: in tables.
        method: "stock" (Diffusers' own processors), "dense", "radial", "adaspa" or "paro", at their defaults.
        quant: integers in attention; see `KernelOptions`.
        linears: "none" or "fp8"; see `quantize_linears`.
        compiled: whether blocks are.
        kernel: of dense attention: a name of `DENSE_KERNELS`, `BEST`, or "" for what the processor takes.
        fused_norm: see `KernelOptions`.
        cached: a step that FirstBlockCache skips: the first block and what is around the blocks.
        all_layers: whether those layers are sparse, too, that the method leaves dense.
        published: whether Radial keeps blocks by the rule of its authors' code (`coverage="majority"`).
    """

    name: str
    title: str
    method: str
    quant: str | None = None
    linears: str = "none"
    compiled: bool = True
    kernel: str = ""
    fused_norm: str = "auto"
    cached: bool = False
    all_layers: bool = False
    published: bool = False

    @property
    def sparse(self) -> bool:
        """Whether blocks are left out."""
        return self.method not in ("stock", "dense")

    @property
    def searches(self) -> bool:
        """Whether its first step makes the maps of the others."""
        return self.method in ("adaspa", "paro")

    @property
    def exact(self) -> bool:
        """Whether its output differs from another such one by rounding in bfloat16 alone."""
        return not self.sparse and self.quant is None and self.linears == "none"

    def processor(self) -> Processor | None:
        """A sparse step of the method, at once and from the first step on; None for Diffusers' own."""
        if self.method == "stock":
            return None
        if self.method == "dense":
            return DenseProcessor(quant=self.quant, fused_norm=self.fused_norm)
        if self.method == "radial":
            return RadialProcessor(
                first_steps=0, first_layers=0 if self.all_layers else None, quant=self.quant,
                coverage="majority" if self.published else None,
            )  # fmt: skip
        if self.method == "adaspa":
            return AdaSpaProcessor(first_steps=0, refresh=(), num_steps=STEPS, quant=self.quant)
        return PAROProcessor(first_steps=0, num_steps=STEPS, quant=self.quant)

    def usual(self) -> Processor:
        """The method with its own schedule."""
        usual: dict[str, type[Processor]] = {
            "radial": RadialProcessor, "adaspa": AdaSpaProcessor, "paro": PAROProcessor
        }  # fmt: skip
        return usual[self.method]()


STEP_CONTENDERS: dict[str, StepContender] = {
    contender.name: contender
    for contender in (
        StepContender("dense", "dense, fastest kernel, compiled", "dense", kernel=BEST),
        StepContender("radial", "Radial, compiled", "radial"),
        StepContender("stack", "Radial, INT8, FP8 linears, compiled", "radial", quant="int8", linears="fp8"),
        StepContender("stack-fp8", "the same with FP8 values", "radial", quant="int8-fp8", linears="fp8"),
        StepContender("stock", "Diffusers as shipped", "stock", compiled=False),
        StepContender("radial-int8", "Radial, INT8, compiled", "radial", quant="int8"),
        StepContender("radial-int8-fp8", "Radial, INT8, FP8 values, compiled", "radial", quant="int8-fp8"),
        StepContender("radial-published", "Radial by its authors' rule of blocks, compiled", "radial", published=True),
        StepContender("adaspa", "AdaSpa, compiled", "adaspa"),
        StepContender("adaspa-stack", "AdaSpa, INT8, FP8 linears, compiled", "adaspa", quant="int8", linears="fp8"),
        StepContender("dense-fp8", "dense, FP8 linears, compiled", "dense", linears="fp8", kernel=BEST),
        StepContender("paro", "PARO without a plan, compiled", "paro"),
        StepContender(
            "fa2", "dense, FlashAttention-2", "dense", compiled=False, kernel="fa2", fused_norm="off"
        ),
        StepContender("dense-eager", "dense, our choice of kernel", "dense", compiled=False),
        StepContender("radial-eager", "Radial", "radial", compiled=False),
        StepContender("cached", "all that, skipped by FirstBlockCache", "radial", "int8", linears="fp8", cached=True),
    )
}  # fmt: skip
"""The most valuable first: so they are timed, and what the time does not reach is left out."""


def fastest_kernel(case: Case, device: torch.device) -> str:
    """The dense kernel, of those that are here, that takes least time for an attention of a case; "" off a GPU.

    Args:
        case: whose heads and tokens count, of these `CHOICE_TOKENS` at most.
        device: where it runs.
    """
    if device.type != "cuda":
        return ""
    length = min(case.layout().length, CHOICE_TOKENS)
    shape = (1, length, case.model.heads, case.model.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    layout, scale = TokenLayout(VideoGrid(1, 1, length)), case.model.head_dim**-0.5
    calls: dict[str, Callable[[], Any]] = {OWN: lambda: attend(q, k, v, layout=layout)}
    for name, kernel in DENSE_KERNELS.items():
        if kernel.unsuited(q) is None:
            calls[name] = lambda kernel=kernel: kernel.attend(q, k, v, scale)  # type: ignore[misc]
    times = {}
    for name, call in calls.items():
        call()  # compiles
        times[name] = min(_seconds(call) for _ in range(2))
    told = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in sorted(times.items(), key=lambda t: t[1]))
    print(f"dense attention of {length} tokens: {told}", flush=True)
    return min(times, key=times.__getitem__)


def _seconds(call: Callable[[], Any]) -> float:
    """Of a call on the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def bound(model: Any, contender: StepContender, best: str, backend: str = "inductor") -> Iterator[Processor | None]:
    """A transformer that steps as a contender does, with what its linear layers are already; undone at the end.

    Args:
        model: of `build`, quantized by the caller where the contender asks for it.
        contender: what to do.
        best: what `BEST` stands for; "" leaves the choice to the processor.
        backend: of torch.compile.

    Raises:
        Missing: the dense kernel of the contender cannot run here.
    """
    processor = contender.processor()
    with ExitStack() as undo:
        if processor is not None:
            sparsify(model, processor)
            undo.callback(restore, model)
        kernel = best if contender.kernel == BEST else contender.kernel
        if kernel:
            _check_here(kernel, next(model.parameters()).device)
            undo.enter_context(_taking(model, kernel))
        if contender.cached:
            undo.enter_context(_skipping(model, backend if contender.compiled else None))
        elif contender.compiled:
            undo.callback(run_eagerly, model)
            compile_blocks(model, backend)
        yield processor


def _check_here(kernel: str, device: torch.device) -> None:
    """Raise Missing where a dense kernel cannot run."""
    reason = None if kernel == OWN else DENSE_KERNELS[kernel].missing(device)
    if reason is not None:
        raise Missing(reason)


@contextmanager
def _taking(model: Any, kernel: str) -> Iterator[None]:
    """Dense calls by a kernel, whatever a processor would choose; it is given no mask, so all text has to be valid."""

    def choose(module: Any, args: Any) -> None:
        for _, layer in tracker_of(module).layers:
            if isinstance(layer.plan, DensePlan):
                layer.plan = replace(layer.plan, kernel=kernel, key_mask=None)

    handle = model.register_forward_pre_hook(choose)  # after the tracker's, which makes the plans
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _skipping(model: Any, backend: str | None) -> Iterator[None]:
    """FirstBlockCache around blocks that are compiled: its own code does not go into a graph."""
    from diffusers import FirstBlockCacheConfig

    if backend is not None:
        compile_blocks(model, backend)
    model.enable_cache(FirstBlockCacheConfig(threshold=SKIP_ALWAYS))
    try:
        with model.cache_context("cond"):
            yield
    finally:
        model.disable_cache()
        run_eagerly(model)
