"""What goes together: every pair of accelerations runs, repeats, and leaves nothing behind; the others are refused."""

from itertools import combinations

import float8
import pytest
import torch
from stacks import FAMILIES, SETS, STEPS, Stacked, check, pairs

from videosparse._diffusers import step_cache_states
from videosparse.generation import GenerationError, GenerationRequest, compiling, stack
from videosparse.generation.presets import SPEEDS
from videosparse.generation.stack import PARTS, REFUSED, Stack, check_together, parts_of
from videosparse.generation.step_cache import StepCache


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    float8.allow(monkeypatch)
    monkeypatch.setattr(stack, "compile_blocks", lambda t: compiling.compile_blocks(t, backend="eager"))
    torch._dynamo.reset()


@pytest.mark.parametrize("pair", [pair for pair in pairs() if "compile" not in pair], ids="+".join)
def test_pairs(pair):
    """One by one where that is cheap; what is compiled is in the sets below."""
    check(Stacked("wan", pair))


COMPILED = [parts for parts in SETS if "compile" in parts]


def families_of(parts):
    """Which families take a set. Wan's sets without MagCache are those of its two experts, below; the two others, which
    compile half a minute each, share the compiled sets, and a GPU runs all of them."""
    others = FAMILIES[1:]
    if parts in COMPILED:
        others = others[COMPILED.index(parts) % 2 :][:1]
    return (*FAMILIES[: "magcache" in parts], *others)


@pytest.mark.parametrize(
    ("parts", "family"),
    [pytest.param(parts, family, id=f"{'+'.join(parts)}-{family}") for parts in SETS for family in families_of(parts)],
)
def test_sets(parts, family):
    check(Stacked(family, parts))


def test_the_sets_have_every_pair():
    assert {frozenset(pair) for parts in SETS for pair in combinations(parts, 2)} >= {frozenset(p) for p in pairs()}


@pytest.mark.parametrize("parts", [parts for parts in SETS if "magcache" not in parts], ids="+".join)
def test_sets_of_two_experts(parts):
    check(Stacked("wan22", (*parts, "experts")))


def test_sets_of_two_experts_have_every_part():
    tested = {part for parts in SETS if "magcache" not in parts for part in parts}
    assert {part for part in PARTS if frozenset({part, "experts"}) not in REFUSED} == tested | {"experts"}


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("adaspa", ("first-block", "compile")),
        ("adaspa", ("magcache",)),
        ("paro", ("first-block",)),
        ("paro", ("magcache",)),
    ],
)
def test_methods_that_search(method, parts):
    """Layers that were to search at a step that is skipped do so later."""
    check(Stacked("wan", ("sparse", *parts), method=method))


@pytest.mark.parametrize("name", SPEEDS)
def test_speeds_are_tested(name):
    """What a speed combines is in one of the sets, or a pair."""
    keys = {"quant": "int8", "linears": "fp8", "step_cache": "first-block", "compile": "compile"}
    values = SPEEDS[name].values
    assert all(values[key] in (True, part) for key, part in keys.items() if key in values)
    parts = {keys[key] for key in values if key in keys}
    if values.get("method") != "dense":
        parts.add("sparse")
    assert any(parts <= set(known) for known in (*SETS, *pairs()))


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: "+".join(sorted(pair)))
def test_pairs_that_are_refused(pair):
    parts = tuple(part for part in PARTS if part in pair)
    with pytest.raises(GenerationError) as error:
        check_together(("sparse", *parts))
    for part in parts:
        assert PARTS[part].replace("`", "") in str(error.value)
    assert str(error.value).endswith(f"do not go together: {REFUSED[pair]}.")
    check_together((parts[0], "sparse"))


def test_parts_of_a_request():
    request = GenerationRequest(
        "x", method="adaspa", options={"adaspa": {"quant": "int8", "offload_state": True}}, loras=("a",), ultravico=0.9,
        context_frames=81,
    )  # fmt: skip
    everything = Stack(StepCache("magcache", 0.1), "fp8", True, "group")
    assert parts_of(request, everything, 2) == tuple(part for part in PARTS if part not in ("first-block", "model"))
    assert parts_of(GenerationRequest("x", method="dense"), Stack()) == ()
    assert parts_of(GenerationRequest("x"), Stack(StepCache("first-block", 0.1))) == ("sparse", "first-block")
    with pytest.raises(GenerationError, match=r"magcache and two experts .* do not go together: .*first-block"):
        check_together(parts_of(GenerationRequest("x"), Stack(StepCache("magcache", 0.1)), 2))


@pytest.mark.parametrize(
    ("family", "branches"), [("wan", {"cond", "uncond"}), ("hunyuan", {"cond", "uncond"}), ("mochi", {"cond_uncond"})]
)
@pytest.mark.parametrize("cache", ["first-block", "magcache"])
def test_branches_of_guidance_keep_apart(family, branches, cache, monkeypatch):
    """Each has what its own steps change, and none of it outlives the run."""
    stacked = Stacked(family, ("sparse", cache))
    kept = {}

    def watch(transformer):
        states = step_cache_states(transformer)
        kept[id(states)] = states
        transformer.register_forward_hook(lambda *_: seen.update(residuals(states)))
        return states

    seen = {}
    monkeypatch.setattr("videosparse.generation.step_cache.step_cache_states", watch)
    stacked.run()
    assert set(seen) == branches
    assert len({float(residual.float().sum()) for residual in seen.values()}) == len(branches)
    (states,) = kept.values()
    assert not states._state_cache
    assert not stacked.pipe.transformer.is_cache_enabled


def residuals(states):
    """What a step cache adds where it skips, by branch; MagCache forgets it at the last step."""
    found = {name: vars(state) for name, state in states._state_cache.items()}
    kept = {
        name: state["previous_residual"] if "previous_residual" in state else state["tail_block_residuals"][0]
        for name, state in found.items()
    }
    return {name: residual for name, residual in kept.items() if residual is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_have_no_more_graphs_with_a_step_cache(family, monkeypatch):
    """Dense and sparse, of each kind of block; neither another run nor a cache compiles anything again."""
    count = []

    def counting(graph, example):
        count.append(graph)
        return graph

    monkeypatch.setattr(stack, "compile_blocks", lambda t: compiling.compile_blocks(t, backend=counting))
    stacked = Stacked(family, ("sparse", "compile"))
    stacked.run()
    first = len(count)
    assert first >= 2
    for cache in ("first-block", "magcache"):
        stacked.parts = ("sparse", "compile", cache)
        _, caching = stacked.run()
        assert caching.skipped > 0
        stacked.run(seed=1)
        assert len(count) == first
    blocks = compiling.compile_blocks(stacked.pipe.transformer)
    assert blocks == 0, "they are compiled already"
    assert caching.forwards == STEPS * stacked.kind.calls
