"""What goes together: every pair of accelerations runs, repeats, and leaves nothing behind; the others are refused."""

from itertools import combinations

import float8
import pytest
import torch
from stacks import BUILDS, SETS, Stacked, pairs

from videosparse import attach
from videosparse.generation import compiling, stack
from videosparse.generation.stack import PARTS, REFUSED

FAMILIES = ("wan", "hunyuan", "mochi")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    float8.allow(monkeypatch)
    monkeypatch.setattr(stack, "compile_blocks", lambda t: compiling.compile_blocks(t, backend="eager"))
    torch._dynamo.reset()


def check(stacked):
    """A run repeats bit by bit, also after another; a step cache skips, and at threshold 0 changes nothing."""
    first, count = stacked.run()
    assert first.isfinite().all()
    other, _ = stacked.run(seed=1)
    again, _ = stacked.run()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if {"first-block", "magcache"} & set(stacked.parts):
        assert 0 < count.skipped < count.forwards
        whole, none = stacked.run(threshold=0.0)
        plain, _ = stacked.run(threshold=None)
        assert none.skipped == 0
        assert torch.equal(whole, plain)
        assert not torch.equal(first, plain)


@pytest.mark.parametrize("pair", pairs(), ids="+".join)
def test_pairs(pair):
    check(Stacked("wan", pair))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", SETS, ids="+".join)
def test_sets(family, parts):
    check(Stacked(family, parts))


def test_the_sets_have_every_pair():
    assert {frozenset(pair) for parts in SETS for pair in combinations(parts, 2)} >= {frozenset(p) for p in pairs()}
