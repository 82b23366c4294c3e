"""When queries and keys are normed and rotated by one kernel, in every family, and that it changes rounding only."""

import copy
import logging
from pipes import TINY, assert_as_accurate

import pytest
import torch

from videosparse import DenseProcessor, RadialProcessor, sparsify
from videosparse.models import base, family_of

EVERY = pytest.mark.parametrize("name", TINY)
SPARSE = {"decay": 0.2, "first_steps": 0, "first_layers": 0, "sink": False}
ATTENTIONS = {"wan": 2, "wan_vace": 5, "hunyuan_video": 2, "mochi": 2}


@pytest.fixture
def calls(monkeypatch):
    """As on a GPU, but with torch instead of Triton behind the op; lists the calls of `norm_rotate`."""
    made, real = [], base.norm_rotate

    def spy(*args, **kwargs):
        made.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(base, "missing", lambda device, dtype: None)
    monkeypatch.setattr(base, "norm_rotate", spy)
    base._say_once.cache_clear()
    return made


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def bfloat16(name, grid=(3, 8, 8)):
    torch.manual_seed(1)
    inputs = TINY[name].inputs(grid, 2, [12, 7])
    return {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}


@EVERY
@pytest.mark.parametrize("processor", [DenseProcessor, lambda **kw: RadialProcessor(**SPARSE, **kw)])
def test_fused_is_as_accurate_as_step_by_step(name, processor, calls):
    model = TINY[name].build().to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    inputs = bfloat16(name)
    sparsify(exact, processor(fused_norm="off"))
    truth = forward(exact, {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()})
    sparsify(model, processor(fused_norm="off"))
    steps = forward(model, inputs)
    assert not calls
    sparsify(model, processor())
    assert_as_accurate(forward(model, inputs), steps, truth)
    assert len(calls) == len(family_of(model).attentions(model))


@EVERY
def test_full_precision_differs_in_rounding_only(name, calls, tiny_of):
    model = tiny_of(name)
    sparsify(model, RadialProcessor(**SPARSE, fused_norm="off"))
    steps = TINY[name].forward(model, (3, 8, 8))
    sparsify(model, RadialProcessor(**SPARSE))
    torch.testing.assert_close(TINY[name].forward(model, (3, 8, 8)), steps, rtol=0, atol=1e-5)
    assert len(calls) == ATTENTIONS[name]


@EVERY
def test_autocast(name, calls, tiny_of):
    """Linears give bfloat16, and so do the fused norms, whose weights are float32."""
    model = tiny_of(name)
    inputs = TINY[name].inputs((3, 4, 5), 2, [12, 7])
    sparsify(model, DenseProcessor(fused_norm="off"))
    truth = forward(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        steps = forward(model, inputs)
        sparsify(model, DenseProcessor())
        assert_as_accurate(forward(model, inputs), steps, truth)
    assert len(calls) == ATTENTIONS[name]


@EVERY
def test_fused_projections(name, calls):
    model = TINY[name].build()
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"{type(model).__name__} cannot fuse projections")
    sparsify(model, DenseProcessor(fused_norm="off"))
    apart = TINY[name].forward(model, (3, 4, 5))
    model.fuse_qkv_projections()
    sparsify(model, DenseProcessor())
    torch.testing.assert_close(TINY[name].forward(model, (3, 4, 5)), apart, rtol=0, atol=1e-5)
    assert calls


@EVERY
def test_gradients_go_step_by_step(name, calls):
    model = TINY[name].build().train()
    sparsify(model, RadialProcessor(**SPARSE))
    model(**TINY[name].inputs((3, 4, 5), 2, [12, 7]), return_dict=False)[0].mean().backward()
    assert not calls
    assert all(p.grad is not None for n, p in model.named_parameters() if "attn1.norm_q" in n)


def test_a_checkpoint_that_runs_without_gradients_first_goes_step_by_step(calls):
    model = TINY["wan"].build().train()
    sparsify(model, RadialProcessor(**SPARSE))

    def reentrant(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    model.enable_gradient_checkpointing(reentrant)
    model(**TINY["wan"].inputs((3, 4, 5), 1, []), return_dict=False)[0].mean().backward()
    assert not calls


def test_a_frozen_model_is_fused_also_with_grad_enabled(calls):
    model = TINY["wan"].build().requires_grad_(False)
    sparsify(model, RadialProcessor(**SPARSE))
    model(**TINY["wan"].inputs((3, 4, 5), 1, []), return_dict=False)
    assert len(calls) == 2


def test_torch_wants_none_of_our_kernels(calls, tiny_of):
    model = tiny_of("wan")
    sparsify(model, RadialProcessor(**SPARSE | {"first_layers": 1}, backend="torch"))
    TINY["wan"].forward(model, (3, 4, 5))
    assert not calls


def norms(model):
    return [m for a in family_of(model).attentions(model) for n, m in a.module.named_children() if n.startswith("norm")]


def swap_class(model):
    class Other(torch.nn.RMSNorm):
        pass

    for norm in norms(model):
        norm.__class__ = Other


def hook(model):
    for norm in norms(model):
        norm.register_forward_hook(lambda *a: None)


def wrap(model):
    for norm in norms(model):
        norm.forward = norm.forward


def no_eps(model):
    for norm in norms(model):
        norm.eps = None


def two_eps(model):
    for norm in norms(model)[::2]:
        norm.eps = 1e-3


OBSTACLES = {
    "norm_q is a Other": swap_class,
    "norm_q has hooks, as offloading sets them": hook,
    "norm_q has hooks, as offloading sets them; replaced": wrap,
    "norm_q lacks a weight or an eps, or has a bias": no_eps,
    "norm_q and norm_k differ in eps or size": two_eps,
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_is_not_known_goes_step_by_step_and_is_said_once(reason, calls, caplog):
    model = TINY["wan"].build()
    OBSTACLES[reason](model)
    reason = reason.partition(";")[0]
    sparsify(model, DenseProcessor())
    with caplog.at_level(logging.INFO, logger="videosparse"):
        TINY["wan"].forward(model, (3, 4, 5))
    assert not calls
    assert [r.message for r in caplog.records if "step by step" in r.message] == [
        f"Queries and keys are normed and rotated step by step: {reason}."
    ]
    sparsify(model, DenseProcessor(fused_norm="on"))
    with pytest.raises(RuntimeError, match=f'fused_norm="on" cannot run here: {reason}. Use fused_norm="auto"'):
        TINY["wan"].forward(model, (3, 4, 5))


def test_on_says_what_is_missing(tiny_of):
    model = tiny_of("mochi")
    sparsify(model, DenseProcessor(fused_norm="on"))
    with pytest.raises(RuntimeError, match=r'fused_norm="on" cannot run here: it needs CUDA or ROCm tensors \(got cpu'):
        TINY["mochi"].forward(model, (3, 4, 5))


def test_on_refuses_gradients(calls):
    model = TINY["hunyuan_video"].build()
    sparsify(model, DenseProcessor(fused_norm="on"))
    with pytest.raises(RuntimeError, match="it has no gradient, and one is needed"):
        model(**TINY["hunyuan_video"].inputs((3, 4, 5), 2, [12, 7]))


@pytest.mark.parametrize("processor", [DenseProcessor, RadialProcessor])
def test_unknown_values_are_refused_at_once(processor):
    with pytest.raises(ValueError, match="fused_norm must be one of auto, on, off"):
        processor(fused_norm="maybe")


@EVERY
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(name, kind, calls):
    """Leaves that are moved one by one keep their own forward; whole blocks are there when it is their turn."""
    model = TINY[name].build()
    sparsify(model, RadialProcessor(**SPARSE))
    plain = TINY[name].forward(model, (3, 8, 8))
    calls.clear()
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **groups)
    torch.testing.assert_close(TINY[name].forward(model, (3, 8, 8)), plain, rtol=0, atol=1e-5)
    assert len(calls) == (ATTENTIONS[name] if kind == "block_level" else 0)


@EVERY
@pytest.mark.parametrize("fused_norm", ["auto", "on"])
def test_compiled_blocks(name, fused_norm, calls, monkeypatch):
    """Without a GPU the compiler fuses the steps of "auto"; "on" is one node of one graph."""
    from videosparse.kernels import norm_op

    monkeypatch.setattr(norm_op, "choose", lambda *a: "torch")
    ran, real = [], norm_op.torch_norm.forward
    monkeypatch.setattr(norm_op.torch_norm, "forward", lambda *a: ran.append(1) or real(*a))
    torch._dynamo.reset()
    model = TINY[name].build()
    sparsify(model, RadialProcessor(**SPARSE, fused_norm="off"))
    steps = TINY[name].forward(model, (3, 8, 8))
    sparsify(model, RadialProcessor(**SPARSE, fused_norm=fused_norm))
    model._repeated_blocks = getattr(model, "_repeated_blocks", None) or ["MochiTransformerBlock"]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(TINY[name].forward(model, (3, 8, 8)), steps, rtol=0, atol=1e-5)
    assert len(ran) == (ATTENTIONS[name] if fused_norm == "on" else 0)
