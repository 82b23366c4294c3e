"""Context windows in every family and with every method: what the transformer is called on, and what comes out."""

from collections import Counter
from pipes import PIPES, TINY

import pytest
import torch
from probes import Probe

import videosparse
from videosparse import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor, context_windows, sparsify
from videosparse.windows import Windows

FAMILIES = ["wan", "hunyuan_video", "mochi"]
STRIDE = {"wan": 4, "hunyuan_video": 4, "mochi": 6}
SPARSE = {"num_steps": 6, "first_steps": 2, "block": 64}
PROCESSORS = {
    "dense": DenseProcessor,
    "radial": lambda: RadialProcessor(**SPARSE, decay=0.2, sink=False, first_layers=0),
    "adaspa": lambda: AdaSpaProcessor(**SPARSE, density=0.7),
    "paro": lambda: PAROProcessor(**SPARSE, density=0.7),
}


def windows(name, model, size, shared):
    """In latent frames."""
    stride = STRIDE[name]
    return context_windows(model, frames=(size - 1) * stride + 1, overlap=shared * stride)


def inputs_of(name, frames):
    torch.manual_seed(1)
    return TINY[name].inputs((frames, 8, 8), 2, [12, 7])


def call(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, return_dict=False, **more)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_blends_what_calls_on_windows_predict(name, tiny_of):
    model, inputs = tiny_of(name), inputs_of(name, 7)
    expected = 0
    assert Windows(4, 2).starts(7) == [0, 2, 3]
    for start, own in zip([0, 2, 3], Windows(4, 2).weights(7), strict=True):
        part = dict(inputs, hidden_states=inputs["hidden_states"][:, :, start : start + 4])
        found = call(model, part)
        whole = found.new_zeros(*found.shape[:2], 7, *found.shape[3:])
        whole[:, :, start : start + 4] = found * own[:, None, None]
        expected = expected + whole
    cls = type(model)
    with windows(name, model, 4, 2):
        assert type(model).__name__ == cls.__name__
        torch.testing.assert_close(call(model, inputs), expected)
        as_dict = model(**inputs)
        torch.testing.assert_close(as_dict.sample, expected)
        positional = model(*inputs.values(), return_dict=False)[0] if name == "wan" else expected
        torch.testing.assert_close(positional, expected)
        sparsify(model, DenseProcessor())  # it stays what it is to who looks at its class
        torch.testing.assert_close(call(model, inputs), expected)
        videosparse.restore(model)
    assert type(model) is cls
    assert not [key for key in vars(model) if key.startswith("_videosparse_window")]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_window_is_the_plain_call(name, tiny_of):
    model, inputs = tiny_of(name), inputs_of(name, 4)
    plain = call(model, inputs)
    for size in (4, 6):
        with windows(name, model, size, 2):
            assert torch.equal(call(model, inputs), plain)


@pytest.mark.parametrize("method", PROCESSORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_sees_one_window(name, method, tiny_of):
    """Six steps: each window is what a run on it alone is, its own searches and maps included."""
    model, inputs = tiny_of(name), inputs_of(name, 7)
    starts = [0, 2, 3]
    alone = []
    for start in starts:
        sparsify(model, PROCESSORS[method]())
        part = dict(inputs, hidden_states=inputs["hidden_states"][:, :, start : start + 4])
        alone.append(steps(model, part))
        videosparse.restore(model)
    processor = PROCESSORS[method]()
    sparsify(model, processor)
    with windows(name, model, 4, 2):
        found = steps(model, inputs)
    weights = Windows(4, 2).weights(7)
    expected = torch.zeros_like(found)
    for start, own, out in zip(starts, weights, alone, strict=True):
        expected[:, :, :, start : start + 4] += out * own[:, None, None]
    torch.testing.assert_close(found, expected)
    assert processor.report().grid.frames == 4
    assert processor.report().steps == 6
    videosparse.restore(model)


def steps(model, inputs):
    out = []
    for step in range(6):
        timed = dict(inputs, timestep=torch.full((2,), 900.0 - 100 * step))
        with model.cache_context("cond"):
            out.append(call(model, timed))
    return torch.stack(out)


def test_a_timestep_for_every_token(tiny_of):
    """As TI2V-5B gets it."""
    model, inputs = tiny_of("wan"), inputs_of("wan", 7)
    tokens = torch.arange(7.0).repeat_interleave(64).expand(2, -1) * 100
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    try:
        with windows("wan", model, 4, 2):
            call(model, dict(inputs, timestep=tokens))
    finally:
        hook.remove()
    assert [list(x[0, ::64]) for x in seen] == [[100.0 * (start + n) for n in range(4)] for start in (0, 2, 3)]


@pytest.mark.parametrize("name", ["wan", "wan22", "wan22_5b", "wan_v2v", "hunyuan_true_cfg", "mochi"])
def test_pipelines(name, pipe_of):
    """Steps, branches and experts are counted as without windows; each branch of each window has a context."""
    kind, pipe = PIPES[name], pipe_of(name)
    stride = 6 if name == "mochi" else 4
    more = {} if name == "wan_v2v" else {"num_frames": 3 * stride + 1}
    plain, probe = kind.run(pipe, **more), Probe()
    sparsify(pipe, probe)
    with context_windows(pipe, frames=2 * stride + 1 if name != "wan_v2v" else stride + 1, overlap=stride):
        found = kind.run(pipe, **more)
    assert found.shape == plain.shape
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
    seen = Counter((context, index) for context, index, _ in probe.steps())
    assert set(seen.values()) == {1}
    assert {index for _, index in seen} == set(range(kind.steps if name != "wan_v2v" else 3))
    assert len({context for context, _ in seen}) == 2 * kind.calls
    assert {total for _, _, total in probe.steps()} == {kind.steps if name != "wan_v2v" else 3}
    videosparse.restore(pipe)
    assert torch.equal(kind.run(pipe, **more), plain)


@pytest.mark.parametrize("name", ["wan_i2v", "wan22_i2v", "wan_vace", "hunyuan_i2v"])
def test_models_with_frames_beside_the_latents_are_refused(name, pipe_of):
    with (
        pytest.raises(NotImplementedError, match="is given frames beside the latents, which only the first window"),
        context_windows(pipe_of(name), frames=5, overlap=4),
    ):
        pass


def test_a_failed_call_leaves_nothing_behind(tiny_of):
    model = tiny_of("wan")
    inputs = inputs_of("wan", 7)
    with windows("wan", model, 4, 2):
        with pytest.raises(RuntimeError):
            call(model, dict(inputs, encoder_hidden_states=torch.zeros(2, 3, 5)))
        assert "_videosparse_window" not in vars(model)
    assert "_videosparse_windows" not in vars(model)


def test_what_is_refused(tiny_of, pipe_of):
    from diffusers import FirstBlockCacheConfig

    model = tiny_of("wan")
    with (
        windows("wan", model, 4, 2),
        pytest.raises(RuntimeError, match="context_windows is in force on this pipeline already"),
        windows("wan", model, 3, 1),
    ):
        pass
    with pytest.raises(NotImplementedError, match=r"torch\.compile holds this transformer as a whole"):
        context_windows(torch.compile(model), frames=5, overlap=4).__enter__()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with (
            windows("wan", model, 4, 2),
            pytest.raises(RuntimeError, match="A step cache compares a call"),
        ):
            call(model, inputs_of("wan", 7))
    finally:
        model.disable_cache()
