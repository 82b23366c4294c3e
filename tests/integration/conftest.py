"""Tiny models and pipelines, built once."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pipes  # noqa: E402  found through the path above

from videosparse import restore  # noqa: E402


@pytest.fixture(scope="session")
def built():
    return {}


@pytest.fixture
def pipe_of(built):
    """`pipe_of(name)`: a pipeline of `pipes.PIPES`, with stock processors before and after."""
    used = []

    def get(name):
        if name not in built:
            built[name] = pipes.PIPES[name].build()
        used.append(built[name])
        return built[name]

    yield get
    for pipe in used:
        restore(pipe)


@pytest.fixture
def tiny_of(built):
    """`tiny_of(name)`: a transformer of `pipes.TINY`, with stock processors before and after."""
    used = []

    def get(name):
        if ("tiny", name) not in built:
            built["tiny", name] = pipes.TINY[name].build()
        used.append(built["tiny", name])
        return built["tiny", name]

    yield get
    for model in used:
        restore(model)


@pytest.fixture(autouse=True)
def _one_thread():
    """Bitwise comparisons need one way to add up; tiny models gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
