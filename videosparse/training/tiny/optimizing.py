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
    decay: float = 1.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.resumed = self.step > 0
        self.told: float | None = None

    @property
    def measured(self) -> float:
        """Seconds spent in this phase by this process' clock, earlier calls included."""
        return self.before + time.monotonic() - self.started

    @property
    def elapsed(self) -> float:
        """Seconds spent in this phase: what was `told` last, so that all ranks count alike, else the own clock."""
        return self.measured if self.told is None else self.told

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.elapsed / (60 * self.minutes)))

    @property
    def ended_by(self) -> str:
        """Which limit was reached first."""
        return "steps" if self.step >= self.steps else "minutes"

    def lr_factor(self) -> float:
        """Cosine over the last `decay` of the phase, 1 before; linear warm-up, a shorter one after a resume."""
        into = max(0.0, self.fraction - (1 - self.decay)) / self.decay if self.decay else 0.0
        factor = 0.5 * (1 + math.cos(math.pi * into))
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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024; rate matched to AdamW's as in arXiv 2502.16982) for matrices, many at a time.

    The same updates as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which reads its rate on the host and so
    cannot be captured in a CUDA graph, and which launches some twenty kernels a matrix: here matrices of one shape
    go through one batch, and the rate may be a tensor.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float | Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        steps: int = 5,
    ) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            group["average"] = torch.zeros_like(torch.stack(group["params"]), requires_grad=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix; gradients that are not finite count as zero."""
        for group in self.param_groups:
            gradients = torch.stack([p.grad for p in group["params"]]).nan_to_num_(0.0, 0.0, 0.0)
            group["average"].lerp_(gradients, 1 - group["momentum"])
            update = self.orthogonal(gradients.lerp_(group["average"], group["momentum"]), group["steps"])
            scale = 0.2 * math.sqrt(max(update.shape[1:])) * group["lr"]
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(group["params"], list((update.to(gradients.dtype) * scale).unbind()))

    def orthogonal(self, x: Tensor, steps: int) -> Tensor:
        """About the nearest orthogonal matrices, in bf16, by Newton-Schulz. x: [N, rows, columns]."""
        a, b, c = self.COEFFICIENTS
        tall = x.shape[1] > x.shape[2]
        x = (x.mT if tall else x).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def block_matrices(transformer: nn.Module) -> list[nn.Parameter]:
    """The matrices of the transformer's blocks, for Muon."""
    return [p for name, p in transformer.named_parameters() if name.startswith("blocks.") and p.ndim == 2]


def adamw(
    modules: Sequence[nn.Module], lr: float | Tensor, capturable: bool = False, without: Sequence[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """Fused AdamW; weight decay only on matrices of the linear and convolution layers; `without` others' parameters."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    others = {id(parameter) for parameter in without}
    for module in modules:
        for name, parameter in module.named_parameters():
            if id(parameter) in others:
                continue
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
            best = math.inf
            with sdpa_kernel(backend):
                # the best of several: one look may fall into another program's work
                for _ in range(8):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(3):
                        out = F.scaled_dot_product_attention(q, k, v)
                        out.backward(out.detach())  # type: ignore[no-untyped-call]
                    torch.cuda.synchronize()
                    best = min(best, time.perf_counter() - start)
            times[backend] = best
            outs[backend] = torch.cat([out.detach().float().flatten()[:100000], q.grad.float().flatten()[:100000]])
        except RuntimeError as error:
            logger.info(f"attention: {backend} failed: {str(error)[:160]}")
    if len(outs) == 2 and (outs[flash] - outs[cudnn]).norm() > 0.05 * outs[flash].norm():
        logger.info("attention: cuDNN disagrees with flash, not used")
        times.pop(cudnn)
    rounded = {str(k): round(v / 3 * 1e3, 2) for k, v in times.items()}
    logger.info(f"attention: {rounded} ms forward+backward")
    return sorted(times, key=times.__getitem__) + rest
