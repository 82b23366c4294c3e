"""One video on several GPUs: `parallelize`, Ulysses through Diffusers' context parallelism."""

from __future__ import annotations

from typing import Any

import torch

from videosparse._diffusers import enable_ulysses, is_parallel, split_video
from videosparse.attach import sparsify
from videosparse.components import targets
from videosparse.models import family_of
from videosparse.processors import DenseProcessor, LayerProcessor
from videosparse.sharing import check_heads


def parallelize(pipe_or_transformer: object, *, uneven: bool = False) -> None:
    """Let all processes of a `torchrun` make one video together: each holds a part of its tokens.

    Call it on every rank, with the pipeline on that rank's device, then generate with the same arguments and seed on
    all; every rank gets the whole video. Processors can be attached before or after. For Wan this is
    `transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=...))`; for HunyuanVideo and Mochi it
    says, too, what to split: video tokens, while text, which is short, is on all ranks. Those two work with processors
    of ours only, and get `DenseProcessor()` where they have none.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509: around attention, ranks exchange tokens for heads. Differs from it in
    that text stays on all ranks and is cut by heads.

    Args:
        pipe_or_transformer: a Diffusers pipeline, or its transformer.
        uneven: whether ranks may hold different numbers of tokens, for sizes that do not divide.

    Raises:
        TypeError: not a supported pipeline or transformer.
        RuntimeError: no process group, or it is parallel already.
        ValueError: the ranks cannot share the heads.
        NotImplementedError: HunyuanVideo models whose first frame is modulated by itself.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError(
            "There is no process group: start the program with torchrun --nproc-per-node GPUS, and call "
            "torch.distributed.init_process_group() first."
        )
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return
    transformers: list[Any] = targets(pipe_or_transformer)[1]
    families = [family_of(transformer) for transformer in transformers]
    for transformer in transformers:
        check_shareable(transformer, ranks)
    if families[0].joint and not _has_ours(transformers[0]):
        sparsify(pipe_or_transformer, DenseProcessor())
    for transformer in transformers:
        enable_ulysses(transformer, ranks, sharding_plan(transformer), uneven)


def check_shareable(transformer: Any, ranks: int) -> None:
    """Raise unless so many ranks can share a transformer.

    Raises:
        RuntimeError: it is parallel already.
        ValueError: the ranks cannot share the heads.
        NotImplementedError: HunyuanVideo models whose first frame is modulated by itself.
    """
    check_heads(int(transformer.config.num_attention_heads), ranks)
    if is_parallel(transformer):
        raise RuntimeError(f"This {type(transformer).__name__} is parallel already; load the model again.")
    if transformer.config.get("image_condition_type") == "token_replace":
        raise NotImplementedError(
            "This HunyuanVideo model modulates its first frame by itself, which shards would not know; use one GPU for "
            "each video."
        )


def sharding_plan(transformer: torch.nn.Module) -> dict[str, Any] | None:
    """What to split and gather: video tokens; None for Wan, of which Diffusers knows it."""
    family = family_of(transformer)
    return split_video(family.rotary_dims) if family.joint else None


def _has_ours(transformer: torch.nn.Module) -> bool:
    return isinstance(family_of(transformer).attentions(transformer)[0].module.processor, LayerProcessor)
