"""What every method owes on every real model grid. A new line in POLICIES is tested by being there."""

import dataclasses

import pytest
import torch

from videosparse.cases import CASES
from videosparse.layout import ceil_div
from videosparse.policies import POLICIES, LayerPlan, Mode, RunStep

CPU = torch.device("cpu")


@pytest.fixture(params=POLICIES, ids=str)
def policy(request):
    return POLICIES[request.param]()


@pytest.fixture(params=CASES, ids=str)
def layout(request):
    return CASES[request.param].layout()


def test_policy_is_frozen_named_and_hashable(policy):
    assert dataclasses.is_dataclass(policy)
    assert POLICIES[policy.name] is type(policy)
    assert hash(policy) == hash(type(policy)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.block = (64, 64)


def test_plan_fits_the_layout(policy, layout):
    plan = policy.plan(layout, RunStep("cond", 20, 50), 3, {}, device=CPU)
    assert isinstance(plan, LayerPlan)
    assert plan.layout == layout.aligned(policy.block)
    if plan.mode is Mode.SPARSE:
        index = plan.index
        rows, cols = (ceil_div(plan.layout.length, b) for b in policy.block)
        assert index.block == policy.block
        assert index.shape[2:] == (rows, cols)
        assert (index.q_len, index.kv_len) == (plan.layout.length, plan.layout.length)
        counts = index.row_ptr.diff()
        assert counts.min() > 0, "a query block without keys"
        text_rows = ceil_div(layout.text, policy.block[0])
        held = sum(ceil_div(tokens, policy.block[1]) for tokens in (layout.video, layout.text))  # not those between
        assert not text_rows or (counts.view(-1, rows)[:, -text_rows:] == held).all(), "text rows are not dense"


def test_a_method_that_searches_keeps_its_map(policy, layout):
    if not policy.searches:
        pytest.skip("static")
    state = {}
    first = policy.plan(layout, RunStep("cond", 20, 50), 3, state, device=CPU, samples=2, heads=3)
    later = policy.plan(layout, RunStep("cond", 21, 50), 3, state, device=CPU, samples=2, heads=3)
    assert (first.mode, later.mode) == (Mode.SEARCH, Mode.SPARSE)
    assert later.index is first.index
    rows, cols = (ceil_div(first.layout.length, b) for b in policy.block)
    assert first.index.shape == (2, 3, rows, cols)
    assert first.lse is None or first.lse.shape == (2, 3, first.layout.length)
    density, video_density = policy.densities(layout)
    assert 0 < video_density <= density < 1
    assert first.index.capacity == pytest.approx(density * rows * cols * 6, rel=1e-9), (
        "the density of the report is exact"
    )
    kept = policy.state_bytes(layout, 2, 3)
    lse = 0 if first.lse is None else first.lse.numel() * first.lse.element_size()
    assert sum(kept.values()) == first.index.bytes + lse


def test_a_selection_fits_the_layout(policy, layout):
    if not policy.searches:
        pytest.skip("static")
    aligned = layout.aligned(policy.block)
    rows, cols = (ceil_div(aligned.length, b) for b in policy.block)
    if rows * cols > 2**20:
        pytest.skip("much to sort on a CPU")
    index = policy.select(torch.rand(1, 2, rows, cols), layout)
    counts = index.row_ptr.diff().view(2, rows)
    video_rows, text_cols = ceil_div(layout.video, policy.block[0]), ceil_div(layout.text, policy.block[1])
    assert counts.min() > text_cols
    assert (counts[:, video_rows:] == cols).all(), "text rows are not dense"
    ids = index.ids[: int(index.row_ptr[-1])]
    for column in range(cols - text_cols, cols):
        assert (ids == column).sum() == 2 * rows, "a row does not read the text"


def test_a_static_map_is_what_the_plan_reads(policy, layout):
    block_map = policy.static_map(layout)
    if block_map is None:
        pytest.skip("searches")
    plan = policy.plan(layout, RunStep("cond", 20, 50), 3, {}, device=CPU)
    assert torch.equal(block_map.index().ids, plan.index.ids)
    assert torch.equal(block_map.index().row_ptr, plan.index.row_ptr)


def test_pure_policies_depend_on_the_layout_alone(policy, layout):
    if not policy.pure:
        pytest.skip("stateful")
    first = policy.plan(layout, RunStep("cond", 0, 50), 0, {}, device=CPU)
    later = policy.plan(layout, RunStep("uncond", 49, 50), 7, {}, device=CPU)
    assert torch.equal(first.index.ids, later.index.ids)
    assert torch.equal(first.index.row_ptr, later.index.row_ptr)
