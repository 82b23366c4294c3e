"""Weights that do not fit one GPU: shards by FSDP2, which `accelerate launch --use_fsdp --fsdp_version 2` asks for.

The forward computes in the dtypes of a run without shards: frozen weights are gathered in theirs, adapters in fp32.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from videosparse.training.config import Config, ConfigError

_ASK = "accelerate launch --use_fsdp --fsdp_version 2"


def shard_plugin(config: Config) -> Any:
    """What tells accelerate to shard the weights; None where nobody asked for it.

    Raises:
        ConfigError: shards that do not work, or not with this configuration.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"Weights are sharded by FSDP2 only (got --fsdp_version {version}); use {_ASK}.")
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError("--fsdp_activation_checkpointing would rename the adapters; use train.checkpointing = true.")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError(
            "--fsdp_offload_params is not supported: checkpoints and moving averages of shards are not tested on the "
            "CPU; drop it, and shard over more GPUs, or set train.checkpointing = true."
        )
    if config.model.fp8:
        raise ConfigError("model.fp8 does not work with sharded weights; set model.fp8 = false, or drop --use_fsdp.")
    if config.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer {config.train.optimizer} does not work with sharded weights; use adamw, whose states are "
            "sharded, too."
        )
    return FullyShardedDataParallelPlugin(
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        # Diffusers loads on every process, so there is nothing to send around; and what accelerate (1.15) does to send
        # it takes models of transformers only: fsdp2_load_full_state_dict asks for `get_parameter_or_buffer`
        cpu_ram_efficient_loading=False,
        # accelerate's own would round inputs, rotary embeddings and adapters to bf16; autocast does what it does else
        mixed_precision_policy=MixedPrecisionPolicy(),
    )


def choose_blocks(plugin: Any, transformer: nn.Module) -> None:
    """Say which modules are gathered at once, where the command does not: the blocks that Diffusers never splits.

    Raises:
        ConfigError: the command names a class that the transformer does not have.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        return
    present = {type(module).__name__ for module in transformer.modules()}
    blocks: list[str] = [name for name in getattr(transformer, "_no_split_modules", None) or () if name in present]
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate takes all that Diffusers lists, and stumbles over blocks of other variants of the model
        plugin.transformer_cls_names_to_wrap = blocks
    for name in plugin.transformer_cls_names_to_wrap:
        if name not in present:
            raise ConfigError(
                f"--fsdp_transformer_layer_cls_to_wrap {name} is no class in {type(transformer).__name__}; its blocks "
                f"are {','.join(blocks)}, and are taken where none is named."
            )


def drop_gathered(module: nn.Module) -> None:
    """Forget gathered weights, where shards are changed: FSDP2 keeps those of the root between two forwards."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
