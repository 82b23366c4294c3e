"""Optimiser, schedule, moving average, the choice of an attention backend, and a log line now and then."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a phase is: the larger of its step share and its time share, over all its calls."""

    steps: int
    minutes: float
    step: int = 0
    before: float = 0.0
    since_resume: int = 0
    warmup: int = 300

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.resumed = self.step > 0

    @property
    def elapsed(self) -> float:
        """Seconds spent in this phase, earlier calls included."""
        return self.before + time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.elapsed / (60 * self.minutes)))

    @property
    def ended_by(self) -> str:
        """Which limit was reached first."""
        return "steps" if self.step >= self.steps else "minutes"

    def lr_factor(self) -> float:
        """Cosine over `fraction`; linear warm-up at the start, and a shorter one after a resume."""
        factor = 0.5 * (1 + math.cos(math.pi * self.fraction))
        warmup = 200 if self.resumed else self.warmup
        return factor * min(1.0, (self.since_resume + 1) / warmup)

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        self.since_resume += 1


class Ema:
    """An exponential moving average of parameters, written into `shadow`, a copy of the module."""

    def __init__(self, module: nn.Module, shadow: nn.Module, decay: float = 0.999, updates: int = 0) -> None:
        self.source: list[Tensor] = list(module.parameters())
        self.target: list[Tensor] = list(shadow.requires_grad_(False).eval().parameters())
        self.decay, self.updates = decay, updates

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights; fast in the first steps."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.target, self.source, 1 - decay)


def adamw(modules: Sequence[nn.Module], lr: float | Tensor, capturable: bool = False) -> torch.optim.AdamW:
    """Fused AdamW; weight decay only on matrices of the linear and convolution layers."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            matrix = parameter.ndim >= 2 and not any(key in name for key in ("shared", "table", "gamma", "bias"))
            (decay if matrix else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True, capturable=capturable)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the rate; into the tensor if there is one, since a captured graph reads that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class Ticker:
    """One log line about every ten seconds; only then is the loss read from the device."""

    def __init__(self, name: str, progress: Progress, seconds: float = 10.0) -> None:
        self.name, self.progress, self.seconds = name, progress, seconds
        self.last, self.last_step = time.monotonic(), progress.step

    def __call__(self, loss: Tensor, lr: float, extra: str = "") -> None:
        """Log, if it is time to."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return
        p = self.progress
        rate = (p.step - self.last_step) / (now - self.last)
        left = min((p.steps - p.step) / max(rate, 1e-6), 60 * p.minutes - p.elapsed)
        logger.info(
            f"{self.name} step {p.step} loss {loss.item():.4f} lr {lr:.2e} {rate:.1f} it/s "
            f"{100 * p.fraction:.0f}% ETA {left:.0f}s {extra}"
        )
        self.last, self.last_step = now, p.step


def timed(device: torch.device, call: Callable[[], Any], count: int) -> float:
    """Seconds a call, after one to warm up."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def pick_attention(length: int = 2304, batch: int = 48) -> list[Any]:
    """SDPA backends by measured speed of forward and backward; a backend that fails or is wrong goes last."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    base = torch.randn(3, batch, length, 4, 64, device="cuda", dtype=torch.bfloat16)
    times, outs = {}, {}
    for backend in (flash, cudnn):
        try:
            q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in base)
            with sdpa_kernel(backend):
                for run in range(8):
                    if run == 3:
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, v)
                    out.backward(out.detach())  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
            times[backend] = time.perf_counter() - start
            outs[backend] = torch.cat([out.detach().float().flatten()[:100000], q.grad.float().flatten()[:100000]])
        except RuntimeError as error:
            logger.info(f"attention: {backend} failed: {str(error)[:160]}")
    if len(outs) == 2 and (outs[flash] - outs[cudnn]).norm() > 0.05 * outs[flash].norm():
        logger.info("attention: cuDNN disagrees with flash, not used")
        times.pop(cudnn)
    rounded = {str(k): round(v / 5 * 1e3, 2) for k, v in times.items()}
    logger.info(f"attention: {rounded} ms forward+backward")
    return sorted(times, key=times.__getitem__) + rest
