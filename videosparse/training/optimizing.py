"""The optimizer, its rate, and the moving average of what is trained."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from videosparse.training.config import ConfigError, TrainConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or that of bitsandbytes with states of 8 bits.

    Raises:
        ConfigError: bitsandbytes is asked for and not installed.
    """
    arguments: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": (0.9, 0.99)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("train.optimizer adamw8bit needs bitsandbytes; pip install bitsandbytes, or use adamw.")
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **arguments)
    return optimizer


def rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine down to `final_lr` of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    into = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, into))))


class Average:
    """A moving average of parameters, fast in the first steps.

    Args:
        parameters: by name.
        decay: share of the average that each step keeps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after optimizer step `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - keep)
