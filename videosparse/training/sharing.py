"""Clips that do not fit one GPU: processes share the tokens of a clip, and heads within attention (Ulysses)."""

from __future__ import annotations

from typing import Any

from videosparse.training.config import ConfigError
from videosparse.training.families import TrainingFamily


def share_clips(transformer: Any, family: TrainingFamily, degree: int) -> None:
    """Let every `degree` neighbouring processes share clips, forward and backward.

    Raises:
        ConfigError: another family than Wan, or heads that cannot be shared out.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from videosparse._diffusers import share_sequence

    if not family.parallel:
        raise ConfigError("train.sequence_parallel works for Wan only; use 1, or shard with FSDP.")
    heads = int(transformer.config.num_attention_heads)
    if heads % degree:
        raise ConfigError(f"train.sequence_parallel must divide the {heads} heads of the model (got {degree}).")
    device = next(transformer.parameters()).device
    groups = dist.get_world_size() // degree
    mesh = init_device_mesh(device.type, (groups, 1, degree), mesh_dim_names=("groups", "ring", "ulysses"))
    share_sequence(transformer, mesh["ring", "ulysses"], degree, device)
