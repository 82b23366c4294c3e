"""AdaSpa between runs: how they end, what is left of them, batches, and other grids."""

import gc
import weakref
from pipes import PIPES, TINY

import pytest
import torch
from searches import GRID, modes_of, run, trackers_of

from videosparse import AdaSpaProcessor, RadialProcessor, restore, sparsify


@pytest.mark.parametrize("error", [ValueError("of the user"), KeyboardInterrupt()])
def test_a_run_that_fails_in_a_callback_keeps_nothing(error, pipe_of):
    pipe = pipe_of("wan")
    bar = pipe.progress_bar
    sparsify(pipe, AdaSpaProcessor(first_steps=1))
    expected = run("wan", pipe)
    held = []

    def fail(pipe, index, timestep, kwargs):
        if index == 2:
            held.extend(bool(tracker.states) for tracker in trackers_of(pipe))
            raise error
        return kwargs

    with pytest.raises(type(error)):
        run("wan", pipe, callback_on_step_end=fail)
    assert held == [True]
    (tracker,) = trackers_of(pipe)
    assert not tracker.states
    assert all(layer.plan is None for _, layer in tracker.layers)
    assert torch.equal(run("wan", pipe), expected)
    restore(pipe)
    assert pipe.progress_bar == bar
    assert "progress_bar" not in vars(pipe)


def test_a_bar_of_the_users_own_stays(pipe_of):
    from tqdm import tqdm

    pipe, seen = pipe_of("wan"), []

    def own(iterable=None, total=None):
        seen.append(total)
        return tqdm(total=total, disable=True)

    pipe.progress_bar = own
    try:
        for _ in range(2):
            sparsify(pipe, AdaSpaProcessor())
        run("wan", pipe)
        assert seen == [6]
        restore(pipe)
        assert pipe.progress_bar is own
    finally:
        vars(pipe).pop("progress_bar", None)


def test_samples_of_a_batch_have_maps_of_their_own(pipe_of, planned):
    """Mochi batches negative and positive prompts; the text of each has its own length."""
    pipe = pipe_of("mochi")
    stock = run("mochi", pipe, prompt=["dance monkey a cat", "a"], negative_prompt=["", "cat"], num_inference_steps=4)
    sparsify(pipe, AdaSpaProcessor(density=1.0))
    full = run("mochi", pipe, prompt=["dance monkey a cat", "a"], negative_prompt=["", "cat"], num_inference_steps=4)
    torch.testing.assert_close(full, stock, rtol=0, atol=2e-5)
    sparsify(pipe, AdaSpaProcessor(density=0.3, refresh=()))
    maps = []

    def look(pipe, index, timestep, kwargs):
        maps.append(planned[-1][2].index.block_map().keep)
        return kwargs

    run("mochi", pipe, prompt=["dance monkey a cat", "a"], negative_prompt=["", "cat"], num_inference_steps=4,
        callback_on_step_end=look)  # fmt: skip
    keep = maps[0]
    assert keep.shape[:2] == (4, 2)
    assert len({keep[i].numpy().tobytes() for i in range(4)}) == 4
    assert all(torch.equal(keep, later) for later in maps), "without a refresh the map stays"


def test_prompts_of_a_batch_equal_prompts_alone(tiny_of):
    """A sample of a batch selects as it does alone."""
    tiny, model = TINY["hunyuan_video"], tiny_of("hunyuan_video")
    torch.manual_seed(1)
    both = tiny.inputs(GRID, 2, [12, 5])

    def forward(inputs):
        sparsify(model, AdaSpaProcessor(density=0.3, num_steps=3, refresh=3))
        out = []
        for timestep in (900.0, 600.0, 300.0):
            batch = inputs["hidden_states"].shape[0]
            with torch.no_grad():
                out.append(model(**{**inputs, "timestep": torch.full((batch,), timestep)}, return_dict=False)[0])
        return out[-1]

    together = forward(both)
    for i in range(2):
        alone = forward({key: value[i : i + 1] for key, value in both.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["between steps", "inside the model"])
def test_a_run_after_a_broken_one(where, pipe_of, planned):
    pipe = pipe_of("wan")
    sparsify(pipe, AdaSpaProcessor(density=0.3))
    good = run("wan", pipe)
    expected = modes_of(planned, "cond")

    def stop(pipe, index, timestep, kwargs):
        if index == 2:
            raise Broken
        return kwargs

    def fail(*_):
        if planned[-1][0].index == 2:
            raise Broken

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail) if where == "inside the model" else None
    with pytest.raises(Broken):
        run("wan", pipe, callback_on_step_end=None if hook else stop)
    if hook is not None:
        hook.remove()
        assert not trackers_of(pipe)[0].states, "a failure inside the model frees at once"
    planned.clear()
    assert torch.equal(run("wan", pipe), good)
    assert modes_of(planned, "cond") == expected


@pytest.mark.parametrize("end", ["run", "failure", "restore", "another grid"])
def test_nothing_is_left_of_a_run(end, planned):
    kind = PIPES["wan"]
    pipe = kind.build()
    sparsify(pipe, AdaSpaProcessor(density=0.3))

    def stop(pipe, index, timestep, kwargs):
        if index == 3 and end != "run":
            raise Broken
        return kwargs

    if end == "run":
        run("wan", pipe)
    elif end == "failure":
        hook = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Broken()))
        with pytest.raises(Broken):
            run("wan", pipe)
        hook.remove()
    else:
        with pytest.raises(Broken):
            run("wan", pipe, callback_on_step_end=stop)
    kept = [weakref.ref(t) for _, _, plan in planned for t in (plan.index.bits, plan.index.row_ptr, plan.lse)
            if t is not None]  # fmt: skip
    assert kept
    if end == "restore":
        restore(pipe)
    elif end == "another grid":
        kind.run(pipe)
    planned.clear()
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]


def test_another_grid_in_another_run(pipe_of):
    pipe = pipe_of("wan")
    processor = AdaSpaProcessor(density=0.3)
    sparsify(pipe, processor)
    first = run("wan", pipe)
    other = run("wan", pipe, height=256)
    assert torch.equal(run("wan", pipe), first)
    sparsify(pipe, AdaSpaProcessor(density=0.3))
    assert torch.equal(run("wan", pipe, height=256), other)


def test_another_grid_in_the_middle_of_a_run(pipe_of):
    pipe = pipe_of("wan")
    sparsify(pipe, AdaSpaProcessor(density=0.3))

    def grow(pipe, index, timestep, kwargs):
        return {"latents": torch.cat([kwargs["latents"]] * 2, 3)} if index == 2 else kwargs

    with pytest.raises(
        RuntimeError,
        match=r"token grid changed from 3x12x16 to 3x24x16 in the middle of a run.*AdaSpaPolicy.*in a run of its own",
    ):
        run("wan", pipe, callback_on_step_end=grow)
    run("wan", pipe)
    sparsify(pipe, RadialProcessor(first_steps=0))
    run("wan", pipe, callback_on_step_end=grow)
