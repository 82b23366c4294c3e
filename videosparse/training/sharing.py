"""Clips that do not fit one GPU: processes share the tokens of a clip, and heads within attention (Ulysses)."""

from __future__ import annotations

from typing import Any

from videosparse._diffusers import enable_ulysses_in_groups
from videosparse.parallel import sharding_plan
from videosparse.training.config import ConfigError


def share_clips(transformer: Any, degree: int) -> None:
    """Let every `degree` neighbouring processes share clips, forward and backward.

    Call it after the processors are bound: HunyuanVideo and Mochi can be shared with processors of ours only.

    Raises:
        ConfigError: heads that cannot be shared out.
    """
    heads = int(transformer.config.num_attention_heads)
    if heads % degree:
        raise ConfigError(f"train.sequence_parallel must divide the {heads} heads of the model (got {degree}).")
    enable_ulysses_in_groups(transformer, degree, sharding_plan(transformer))
