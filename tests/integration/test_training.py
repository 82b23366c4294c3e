"""Training: gradients through checkpointing whatever else runs in between, no run and no clock, half precision."""

from pipes import TINY, assert_as_accurate

import pytest
import torch

from videosparse import DenseProcessor, RadialProcessor, sparsify
from videosparse.models import family_of

EVERY = pytest.mark.parametrize("name", TINY)
SPARSE = {"decay": 0.2, "first_steps": 0, "first_layers": 0, "sink": False}


def checkpointing(model, how):
    if how == "non-reentrant":
        model.enable_gradient_checkpointing()
    elif how == "reentrant":

        def checkpoint(*args):
            return torch.utils.checkpoint.checkpoint(*args, use_reentrant=True)

        model.enable_gradient_checkpointing(checkpoint)
    elif how == "compiled":
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        model.enable_gradient_checkpointing()


def inputs_of(name, text, seed=1, grid=(3, 8, 8)):
    torch.manual_seed(seed)
    return TINY[name].inputs(grid, len(text), text)


def loss_of(model, inputs):
    return model(**inputs, return_dict=False)[0].square().mean()


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, exactly=True):
    """Bitwise, or but for the order in which float32 gradients are summed; a wrong plan is off by 1 % and more."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert off <= (0 if exactly else 1e-4), f"{name} is off by {off:.1e}"


@EVERY
@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("processor", [DenseProcessor, lambda: RadialProcessor(**SPARSE)], ids=["dense", "sparse"])
def test_two_forwards_then_one_backward(name, how, processor):
    """Each forward is run again with its own plan: texts, grids and so layouts differ."""
    if (name, how) == ("mochi", "reentrant"):
        pytest.skip("its rotary embedding is learned, and reentrant checkpoints cannot pass gradients to it")
    model = TINY[name].build().train()
    sparsify(model, processor())
    calls = [inputs_of(name, [12, 7]), inputs_of(name, [3, 5], seed=2, grid=(2, 8, 8))]
    for call in calls:
        call["encoder_hidden_states"].requires_grad_()  # reentrant checkpoints need an input that does

    def loss():
        return sum(loss_of(model, call) for call in calls)

    plain = gradients(model, loss)
    checkpointing(model, how)
    assert_same(gradients(model, loss), plain, exactly=how == "non-reentrant")


@EVERY
def test_a_forward_without_gradients_before_backward(name):
    """A teacher's pass of the same model, dense by its schedule and on another grid, leaves the student's alone."""
    model = TINY[name].build()
    model.train()
    sparsify(model, RadialProcessor(**{**SPARSE, "first_steps": 5}))

    def loss():
        student = loss_of(model, inputs_of(name, [12, 7]))
        with torch.no_grad():
            loss_of(model, inputs_of(name, [3, 5], seed=2, grid=(2, 8, 8)))
        model._reset_stateful_cache()
        return student

    plain = gradients(model, loss)
    checkpointing(model, "non-reentrant")
    assert_same(gradients(model, loss), plain)


def test_a_loss_on_hidden_states_alone():
    """Discriminators read features: the output takes no part in backward."""
    model = TINY["hunyuan_video"].build(num_layers=2, num_single_layers=2).train()
    sparsify(model, RadialProcessor(**SPARSE))
    seen = []
    model.single_transformer_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def loss():
        seen.clear()
        for text, seed in (([12, 7], 1), ([3, 5], 2)):
            loss_of(model, inputs_of("hunyuan_video", text, seed))
        return sum(x.square().mean() for x in list(seen))

    plain = gradients(model, loss)
    checkpointing(model, "non-reentrant")
    assert_same(gradients(model, loss), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_compiled_blocks_are_run_again_with_their_own_plan(name):
    model = TINY[name].build(**{"hunyuan_video": {"num_layers": 2, "num_single_layers": 2}}.get(name, {})).train()
    sparsify(model, RadialProcessor(**{**SPARSE, "first_steps": 5}))

    def loss():
        losses = [loss_of(model, inputs_of(name, text)) for text in ([12, 7], [3, 5])]
        with torch.no_grad():
            loss_of(model, inputs_of(name, [12, 12]))
        return sum(losses)

    plain = gradients(model, loss)
    checkpointing(model, "compiled")
    assert_same(gradients(model, loss), plain, exactly=False)


@EVERY
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_has_no_steps_and_no_clock(name, mode):
    """Also in eval mode, with gradients for parameters: nothing to know about steps, and no timestep is read."""
    model = getattr(TINY[name].build(), mode)()
    processor = RadialProcessor(decay=0.2, sink=False, first_steps=0.5, last_steps=1, first_layers=1)
    sparsify(model, processor)
    tracker = vars(model)["_videosparse_tracker"]
    loss_of(model, inputs_of(name, [12, 7])).backward()
    assert [layer.plan.mode for _, layer in tracker.layers][1:] == ["sparse"] * (len(tracker.layers) - 1) or (
        name == "wan_vace"
    )
    assert (tracker.session.clock.run, processor.binding.record) == (0, None)
    model.requires_grad_(False)
    if mode == "eval":
        with pytest.raises(ValueError, match="pass num_steps="):
            loss_of(model, inputs_of(name, [12, 7]))


@EVERY
@pytest.mark.parametrize("processor", [DenseProcessor, lambda: RadialProcessor(**SPARSE)], ids=["dense", "sparse"])
@pytest.mark.parametrize("own", [False, True], ids=["host", "own"])
def test_autocast(name, processor, own, monkeypatch):
    """Norms leave q and k wider than v: attention gets all three in autocast's dtype, as the stock processors do."""
    seen = []
    model = TINY[name].build()
    if own:
        monkeypatch.setattr("videosparse.dense_plans.describe_backend", lambda device: ("triton", ""))
    layers = [attention.module for attention in family_of(model).attentions(model)]
    inputs = inputs_of(name, [12, 7])
    with torch.no_grad():
        exact = model(**inputs, return_dict=False)[0] if processor is DenseProcessor else None
        with torch.autocast("cpu", torch.bfloat16):
            stock = model(**inputs, return_dict=False)[0]
            sparsify(model, processor())
            for layer in layers:
                core = layer.processor.core
                monkeypatch.setattr(
                    layer.processor, "core", lambda *a, core=core: seen.append([x.dtype for x in a[:3]]) or core(*a)
                )
            ours = model(**inputs, return_dict=False)[0]
    assert seen == [[torch.bfloat16] * 3] * len(layers)
    if exact is not None:
        assert_as_accurate(ours, stock, exact)


def test_key_major_lists_are_made_for_training_only(monkeypatch):
    """Outside the graphs of compiled blocks, before the forward; generation does not pay for them."""
    monkeypatch.setattr("videosparse.attach.describe_backend", lambda device: ("triton", ""))
    model = TINY["wan"].build().train()
    sparsify(model, RadialProcessor(**{**SPARSE, "decay": 0.2173}))  # no other test has used these lists
    layers = [layer for _, layer in vars(model)["_videosparse_tracker"].layers]
    inputs = inputs_of("wan", [12, 7])
    with torch.no_grad():
        loss_of(model, inputs)
    assert all(layer.plan.index.key_major is None for layer in layers)
    model._reset_stateful_cache()
    loss_of(model, inputs)
    assert all(layer.plan.index.key_major is not None for layer in layers)


def test_compiling_under_autocast():
    torch._dynamo.reset()
    model = TINY["wan"].build()
    sparsify(model, RadialProcessor(**SPARSE))
    inputs = inputs_of("wan", [12, 7])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager = model(**inputs, return_dict=False)[0]
        model._reset_stateful_cache()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], eager, rtol=0, atol=0)
