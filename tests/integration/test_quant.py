"""Integer attention under every method, in every family: which calls take integers, and how little that changes."""

from pipes import TINY

import pytest
import torch
from test_host_features import branches

from videosparse import AdaSpaProcessor, DenseProcessor, PAROProcessor, RadialProcessor, restore, sparsify
from videosparse.kernels import int8_path

WIDE = {
    "wan": {"attention_head_dim": 64},
    "hunyuan_video": {"attention_head_dim": 64, "rope_axes_dim": (16, 24, 24)},
    "mochi": {"attention_head_dim": 64},
}
SPARSE = {"num_steps": 6, "first_steps": 2, "block": 64}
PROCESSORS = {
    "dense": DenseProcessor,
    "radial": lambda **more: RadialProcessor(**SPARSE, decay=0.2, sink=False, first_layers=0, **more),
    "adaspa": lambda **more: AdaSpaProcessor(**SPARSE, density=0.7, **more),
    "paro": lambda **more: PAROProcessor(**SPARSE, density=0.7, **more),
}
EVERY = pytest.mark.parametrize("method", PROCESSORS)


@pytest.fixture(scope="module")
def wide():
    """Transformers with heads as wide as integer attention takes."""
    return {name: TINY[name].build(**more) for name, more in WIDE.items()}


@pytest.fixture
def quantized(monkeypatch):
    """The kinds of integers of the calls that took some, in order."""
    log, forward = [], int8_path.forward

    def spy(q, k, v, call, need_lse, quant, chosen):
        assert q.dtype is torch.bfloat16
        log.append((quant, call.lists is not None))
        return forward(q, k, v, call, need_lse, quant, chosen)

    monkeypatch.setattr(int8_path, "forward", spy)
    return log


def run(name, model, processor):
    """Two branches of two samples, six steps, in bf16."""
    sparsify(model, processor)
    with torch.autocast("cpu", torch.bfloat16):
        return torch.stack(branches(TINY[name], model)).float()


@EVERY
@pytest.mark.parametrize("name", WIDE)
def test_sparse_calls_take_integers_and_dense_ones_do_not(name, method, wide, quantized):
    exact = run(name, wide[name], PROCESSORS[method]())
    assert not quantized
    processor = PROCESSORS[method](quant="int8")
    found = run(name, wide[name], processor)
    report = processor.report()
    assert report.quant == "int8"
    calls = report.dense_calls if method == "dense" else report.sparse_calls
    assert calls > 0
    assert quantized == [("int8", method != "dense")] * calls
    assert 0 < (found - exact).norm() < 0.02 * exact.norm()
    if method != "dense":
        assert torch.equal(found[:4], exact[:4]), "two branches of the first two steps"


@EVERY
def test_fp8_values(method, wide, quantized):
    found = run("wan", wide["wan"], PROCESSORS[method](quant="int8-fp8"))
    restore(wide["wan"])
    with torch.autocast("cpu", torch.bfloat16):
        exact = torch.stack(branches(TINY["wan"], wide["wan"])).float()
    assert {quant for quant, _ in quantized} == {"int8-fp8"}
    assert (found - exact).norm() < 0.1 * exact.norm()


@EVERY
def test_compiled_blocks(method, wide):
    """One graph a mode, as without integers, and the same numbers."""
    model = TINY["wan"].build(**WIDE["wan"])
    processor = PROCESSORS[method](quant="int8")
    eager = run("wan", model, processor)
    model._reset_stateful_cache()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run("wan", model, PROCESSORS[method](quant="int8")), eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "radial"])
def test_training_is_refused(method, wide):
    model = wide["wan"].train()
    try:
        sparsify(model, PROCESSORS[method](quant="int8"))
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(NotImplementedError, match=r'quant="int8" is for inference: it has no gradient'),
        ):
            model(**TINY["wan"].inputs((3, 8, 8), 1, [12]))
    finally:
        model.eval()
        restore(model)


def test_a_chosen_backend_and_integers_exclude_each_other(wide):
    model = wide["wan"]
    model.set_attention_backend("_native_math")
    try:
        with pytest.raises(ValueError, match=r"set_attention_backend chose _native_math; drop one of both"):
            run("wan", model, DenseProcessor(quant="int8"))
    finally:
        model.set_attention_backend("native")
        model.reset_attention_backend()
        restore(model)


def test_full_precision_models_are_told(wide):
    sparsify(wide["wan"], DenseProcessor(quant="int8"))
    with pytest.raises(TypeError, match=r'quant="int8" takes float16 and bfloat16 \(got torch.float32\)'):
        branches(TINY["wan"], wide["wan"])
    restore(wide["wan"])


@pytest.mark.parametrize("kind", PROCESSORS.values())
def test_an_unknown_kind_of_integers_is_told_at_once(kind):
    with pytest.raises(ValueError, match='quant must be None, "int8", "int8-fp8" or "int8-int8"'):
        kind(quant="int3")
