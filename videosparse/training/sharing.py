"""Clips that do not fit one GPU: processes share the tokens of a clip, and heads within attention (Ulysses)."""

from __future__ import annotations

from typing import Any

import torch

from videosparse._diffusers import enable_ulysses_in_groups
from videosparse.parallel import check_shareable, sharding_plan
from videosparse.training.config import ConfigError


def share_clips(transformer: Any, degree: int, device: torch.device) -> None:
    """Let every `degree` neighbouring processes share clips, forward and backward.

    Call it after the processors are bound: HunyuanVideo and Mochi can be shared with processors of ours only.

    Args:
        transformer: with processors.
        degree: processes that share a clip.
        device: that it computes on.

    Raises:
        ConfigError: a transformer that so many cannot share.
    """
    try:
        check_shareable(transformer, degree)
    except (ValueError, RuntimeError) as error:  # what is not implemented is a RuntimeError, too
        raise ConfigError(f"train.sequence_parallel = {degree} does not fit the model: {error}") from error
    enable_ulysses_in_groups(transformer, degree, sharding_plan(transformer), device)
