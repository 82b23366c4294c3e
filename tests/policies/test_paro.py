"""PAROPolicy: what a plan says about a layer and step, and what is found while a video is made."""

import dataclasses

import pytest
import torch
from random_plans import GRID, make_plan

from videosparse.layout import TokenLayout, VideoGrid
from videosparse.ordering import SearchedOrder
from videosparse.policies import Mode, PAROPolicy, RunStep
from videosparse.policies.base import TRAINING, DenseSchedule

CPU = torch.device("cpu")
LAYOUT = TokenLayout(GRID, 40)


def ask(policy, run, layer=0, state=None, layout=LAYOUT, heads=3, samples=2):
    state = {} if state is None else state
    return policy.plan(layout, run, layer, state, device=CPU, samples=samples, heads=heads)


def test_a_plan_makes_it_pure():
    assert (PAROPolicy(make_plan()).pure, PAROPolicy(make_plan()).searches) == (True, False)
    assert (PAROPolicy().pure, PAROPolicy().searches) == (False, True)
    assert (PAROPolicy(make_plan(), online_maps=True).pure, PAROPolicy().block) == (False, (128, 64))


def test_a_planned_call_depends_on_layer_and_part_of_the_run_alone():
    plan = make_plan(buckets=2)
    policy = PAROPolicy(plan)
    first = ask(policy, RunStep("cond", 0, 8))
    assert first.mode is Mode.SPARSE
    assert first.layout == LAYOUT.aligned((128, 64))
    assert list(first.order.codes) == plan.codes[0].tolist()
    states = {"cond": {}, "uncond": {}}
    for index, bucket in enumerate([0, 0, 1, 1, 2, 2, 2, 2]):
        both = [ask(policy, RunStep(context, index, 8), 1, states[context]) for context in states]
        assert both[0].index is both[1].index, "branches share maps"
        assert both[0].order is both[1].order
        expected = plan.index(LAYOUT.aligned((128, 64)), 1, bucket, CPU)
        assert both[0].index is expected
        assert set(states["cond"]["maps"]) == {bucket, min(bucket + 1, 2)}, "this part's map and the next one's"
        assert both[0].densities == plan.densities(LAYOUT.aligned((128, 64)), 1, bucket)
    states.clear()
    del both, expected, first
    assert len(plan._uploads) == 0, "freed with the run"


def test_training_reads_the_map_of_the_second_half():
    plan, state = make_plan(), {}
    policy = PAROPolicy(plan)
    call = ask(policy, RunStep(TRAINING, 0), 1, state)
    later = ask(policy, RunStep("cond", 7, 8), 1)
    keep = later.index.block_map()
    assert torch.equal(call.index.ids[: call.index.row_ptr[-1]], keep.index().ids)
    assert ask(policy, RunStep(TRAINING, 0), 1, state).index is call.index


def test_which_ranks_can_share_heads():
    made = make_plan()
    for policy in (PAROPolicy(made), PAROPolicy()):
        policy.check_ranks(training=False)
    with pytest.raises(NotImplementedError, match="in training does not work with plans of PAROAttention"):
        PAROPolicy(made).check_ranks(training=True)
    with pytest.raises(NotImplementedError, match="online_maps does not work with context parallelism"):
        PAROPolicy(made, online_maps=True).check_ranks(training=False)


def test_a_plan_needs_the_number_of_steps():
    with pytest.raises(ValueError, match="pass num_steps= to the processor"):
        PAROPolicy(make_plan()).check_run(DenseSchedule(), None)
    PAROPolicy().check_run(DenseSchedule(), None)
    PAROPolicy(make_plan()).check_run(DenseSchedule(), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 2}, "a model with 2 layers, this one has 3"),
        ({"heads": 4}, "a model with 3 heads, this one has 4"),
        ({"layout": TokenLayout(VideoGrid(4, 9, 10))}, "this video has grid 4x9x10; calibrate for it"),
    ],
)
def test_a_plan_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        ask(PAROPolicy(make_plan()), RunStep("cond", 0, 8), **changes)


def test_online_searches_once_then_keeps_order_and_map():
    policy, state = PAROPolicy(density=0.4), {}
    call = ask(policy, RunStep("cond", 3, 8), 1, state)
    assert call.mode is Mode.SEARCH
    assert (call.order, call.lse) == (None, None)
    assert call.codes.shape == (3,)
    assert call.index.shape == (2, 3, 4, 7)
    assert (call.selection.counts.base, call.selection.choose) == (2, True)
    later = ask(policy, RunStep("cond", 4, 8), 1, state)
    assert later.mode is Mode.SPARSE
    assert later.index is call.index
    assert isinstance(later.order, SearchedOrder)
    assert later.order.codes is call.codes
    assert ask(policy, RunStep("cond", 5, 8), 1, state).order is later.order


def test_orders_are_chosen_as_asked():
    for policy, by, alpha in (
        (PAROPolicy(), "metric", 0.5),
        (PAROPolicy(alpha=0.1), "metric", 0.1),
        (PAROPolicy(order_by="mass"), "mass", None),
    ):
        assert (policy.order_by, policy.alpha) == (by, alpha)
        metric = policy.selection(LAYOUT.aligned(policy.block)).metric
        assert metric.by == by
        assert alpha is None or metric.alpha == alpha
    assert PAROPolicy(make_plan()).order_by is None
    assert dataclasses.replace(PAROPolicy(order_by="mass"), density=0.3).order_by == "mass"


def test_online_maps_keep_the_orders_of_a_plan_on_any_grid():
    plan, state = make_plan(), {}
    policy = PAROPolicy(plan, online_maps=True)
    layout = TokenLayout(VideoGrid(5, 4, 20))
    call = ask(policy, RunStep("cond", 3, 8), 1, state, layout)
    assert call.mode is Mode.SEARCH
    assert call.codes.tolist() == plan.codes[1].tolist()
    assert not call.selection.choose
    assert call.selection.counts.base == round(plan.density * 7)
    order = ask(policy, RunStep("cond", 4, 8), 1, state, layout).order
    assert (order.grid, list(order.codes)) == (layout.grid, plan.codes[1].tolist())
    assert PAROPolicy(plan, 0.3, online_maps=True).selection(layout).counts.base == 2


def test_one_online_run_is_one_size():
    policy, state = PAROPolicy(), {}
    ask(policy, RunStep("cond", 0, 8), 0, state)
    with pytest.raises(RuntimeError, match="one run is one size"):
        ask(policy, RunStep("cond", 1, 8), 0, state, samples=1)


def test_figures_of_a_run():
    schedule, layout = DenseSchedule(first_steps=2), TokenLayout(GRID)
    assert PAROPolicy().search_work(schedule, 8, 1) == (0, 3.0)
    assert PAROPolicy().search_work(DenseSchedule(), 8, 1) == (1, 3.0)
    assert PAROPolicy().search_work(DenseSchedule(8), 8, 1) == (0, 0.0)
    plan = make_plan()
    assert PAROPolicy(plan).search_work(schedule, 8, 1) == (0, 0.0)
    assert PAROPolicy(plan, online_maps=True).search_work(schedule, 8, 1) == (0, 0.5)
    assert PAROPolicy(density=0.4).densities(layout) == (0.4, 0.4)
    assert PAROPolicy(plan).densities(layout)[1] == pytest.approx(plan.density)
    assert PAROPolicy(plan).state_bytes(layout, 2, 3) == {}
    assert PAROPolicy().state_bytes(layout, 2, 3)["bits"] == 2 * 3 * 3 * 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrated": "plan"}, "calibrated must be a PAROPlan"),
        ({"density": 0.0}, "density must lie in 0..1, 0 excluded"),
        ({"density": True}, "density must be a number"),
        ({"alpha": 2.0}, "alpha must lie in 0..1"),
        ({"block": (32, 64)}, "block must be"),
        ({"online_maps": 1}, "online_maps must be True or False"),
        ({"online_maps": True}, "online_maps=True keeps the orders of a plan"),
        ({"calibrated": 0, "alpha": 0.5}, "the plan has chosen them"),
        ({"calibrated": 0, "order_by": "mass"}, "order_by=mass chooses orders, and the plan has chosen them"),
        ({"order_by": "rank"}, "order_by must be metric or mass"),
        (
            {"order_by": "mass", "alpha": 0.5},
            "alpha=0.5 weighs the paper's metric, and orders are to be chosen by mass",
        ),
        ({"calibrated": 0, "density": 0.5}, "density=0.5 is not for a plan"),
        ({"calibrated": 0, "block": (64, 64)}, r"the plan has blocks of \(128, 64\)"),
    ],
)
def test_bad_arguments(arguments, message):
    if arguments.get("calibrated") == 0:
        arguments = {**arguments, "calibrated": make_plan()}
    with pytest.raises((TypeError, ValueError), match=message):
        PAROPolicy(**arguments)


def test_copies_read_the_same_plan():
    import copy

    policy = PAROPolicy(make_plan())
    assert copy.deepcopy(policy).calibrated is policy.calibrated


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAROPolicy().density = 0.5
