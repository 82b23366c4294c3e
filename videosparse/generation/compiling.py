"""Compiling the blocks of a transformer, so that what wraps them keeps working: `compile_blocks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from videosparse.components import is_compiled
from videosparse.generation.errors import GenerationError, one_line
from videosparse.models import family_of


def compile_blocks(transformer: torch.nn.Module, *, backend: str = "inductor") -> int:
    """Compile every block with a self-attention, each as one graph; call it before offloading and step caches.

    Diffusers' `compile_repeated_blocks` compiles modules, and the hooks of group offloading and step caches with them:
    first-block caching breaks its graphs until torch gives up on them, and MagCache runs its blocks eagerly, both
    without an error. Here the forward below these hooks is compiled: they decide outside of any graph, and there are as
    many graphs as without them.

    Args:
        transformer: of a supported family; its processors may be exchanged later.
        backend: of `torch.compile`.

    Returns:
        The number of blocks; those that are compiled already are left alone.

    Raises:
        TypeError: no supported transformer.
    """
    names = {attention.name.rpartition(".")[0] for attention in family_of(transformer).attentions(transformer)}
    blocks = [transformer.get_submodule(name) for name in sorted(names)]
    fresh = [block for block in blocks if not is_compiled(block)]
    for block in fresh:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    return len(fresh)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Say what to do where torch cannot compile on this machine."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise GenerationError(
            f"torch.compile failed here ({type(error).__name__}: {one_line(error, 200)}); drop --compile."
        ) from error
