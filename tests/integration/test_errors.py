"""Wrong use says what is wrong, and what to do."""

import re
from pipes import PIPES, TINY, cogvideox
from types import SimpleNamespace

import pytest
import torch
from probes import FullMap, Probe

import videosparse
from videosparse import DenseProcessor, RadialProcessor, parallelize, restore, sparsify
from videosparse.processors import LayerProcessor


@pytest.mark.parametrize("name", [n for n in TINY if n != "mochi"])
def test_a_processor_given_to_a_transformer_says_whom_to_call(name):
    """Diffusers then puts it on every attention, cross-attention included; binding afterwards repairs that."""
    model = TINY[name].build()
    stock = TINY[name].forward(model, (3, 4, 5))
    model.set_attn_processor(RadialProcessor())
    with pytest.raises(RuntimeError, match=r"bound to no pipeline.*Call pipe\.set_attn_processor\(\.\.\.\)"):
        TINY[name].forward(model, (3, 4, 5))
    sparsify(model, DenseProcessor())
    torch.testing.assert_close(TINY[name].forward(model, (3, 4, 5)), stock, rtol=0, atol=1e-5)
    restore(model)
    assert torch.equal(TINY[name].forward(model, (3, 4, 5)), stock)


@pytest.mark.parametrize(("name", "told"), [("wan", False), ("hunyuan_video", True), ("mochi", True)])
def test_restoring_a_shared_transformer_says_what_stays(name, told, caplog):
    model = TINY[name].build()
    sparsify(model, RadialProcessor())
    restore(model)
    assert not caplog.records
    model._parallel_config = SimpleNamespace()
    restore(model)
    assert ("stays shared by ranks" in caplog.text) is told


@pytest.mark.parametrize("name", ["hunyuan_video", "mochi"])
def test_flash_attention_4_cannot_mask_text(name):
    model = TINY[name].build()
    with pytest.raises(ValueError, match=r'backend="fa4" cannot mask text .*; use "auto" or "flex"'):
        sparsify(model, RadialProcessor(backend="fa4"))
    restore(model)
    sparsify(model, DenseProcessor())


def test_a_library_has_no_integer_attention():
    with pytest.raises(ValueError, match='backend="fa4" has no integer attention, which quant="int8" asks for'):
        RadialProcessor(backend="fa4", quant="int8")


def test_unknown_transformers():
    pipe = cogvideox()
    with pytest.raises(TypeError, match=r"CogVideoXTransformer3DModel is not supported; .*Wan.*HunyuanVideo.*Mochi"):
        pipe.set_attn_processor(RadialProcessor())
    with pytest.raises(TypeError, match="CogVideoXTransformer3DModel is not supported"):
        restore(pipe)
    with pytest.raises(TypeError, match=r"Expected a Diffusers pipeline with a transformer.*got dict\); pass what"):
        sparsify({}, RadialProcessor())


def test_not_a_processor(pipe_of):
    with pytest.raises(TypeError, match=r"processor must be a RadialProcessor\(\.\.\.\)"):
        sparsify(pipe_of("wan"), RadialProcessor)


def test_a_custom_processor_is_not_thrown_away():
    model = TINY["wan"].build()

    class Custom:
        pass

    model.blocks[1].attn1.processor = Custom()
    with pytest.raises(TypeError, match=r"blocks\.1\.attn1 has a Custom; only the stock WanAttnProcessor"):
        sparsify(model, RadialProcessor(first_steps=0))
    assert not isinstance(model.blocks[0].attn1.processor, LayerProcessor), "nothing may be half attached"


def parallel(**degrees):
    config = SimpleNamespace(**{"ring_degree": 1, "ulysses_degree": 1, "ring_anything": False, **degrees})
    return SimpleNamespace(context_parallel_config=config)


@pytest.mark.parametrize(
    ("name", "degrees", "message"),
    [
        ("wan", {"ring_degree": 2}, r"ring attention \(ring_degree=2\)"),
        ("mochi", {"ring_degree": 2}, "ring attention"),
        ("wan", {"ulysses_degree": 3}, r"2 attention heads cannot be shared by 3 ranks.*use one of 2, or one GPU"),
    ],
)
def test_parallelism_that_does_not_fit(name, degrees, message):
    model = TINY[name].build()
    # switched on after attaching, as enable_parallelism does: it sets the config of every processor
    sparsify(model, RadialProcessor(first_steps=0))
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), LayerProcessor):
            module.processor._parallel_config = parallel(**degrees)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        TINY[name].forward(model, (3, 4, 5))
    with pytest.raises((NotImplementedError, ValueError), match=message):
        sparsify(model, RadialProcessor(first_steps=0))


def test_parallelize_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"no process group: start the program with torchrun"):
        parallelize(TINY["wan"].build())


def test_training_with_a_method_that_keeps_state():
    model = TINY["wan"].build().train()
    sparsify(model, Probe(FullMap(pure=False)))
    with pytest.raises(RuntimeError, match="FullMap keeps state between steps and cannot be trained with"):
        model(**TINY["wan"].inputs((1, 4, 4), 1, []))
    TINY["wan"].forward(model, (1, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -1.0}, r"decay must be positive and finite \(got -1"),
        ({"block": 96}, "block must be .* each 64 or 128"),
        ({"block": (64, 32)}, "block must be .* each 64 or 128"),
        ({"coverage": "all"}, "coverage must be majority or any"),
        ({"first_neighbour": "none"}, "first_neighbour must be full or half"),
        ({"first_steps": 1.5}, r"first_steps must be an int >= 0 or a fraction 0\.\.1"),
        ({"first_steps": -1}, "first_steps must be"),
        ({"num_steps": 0}, "num_steps must be an int of at least 1"),
        ({"num_steps": True}, "num_steps must be an int of at least 1"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch"),
    ],
)
def test_values_out_of_range_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        RadialProcessor(**arguments)


def test_processors_do_not_change():
    with pytest.raises(AttributeError, match="cannot assign to field 'decay'"):
        RadialProcessor().decay = 0.5


def test_more_dense_layers_than_layers(pipe_of):
    with pytest.raises(ValueError, match="asks for 3 dense layers, the model has 2"):
        sparsify(pipe_of("wan"), RadialProcessor(first_layers=2, last_layers=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sink": "no"}, r"sink must be True or False \(got 'no'\)"),
        ({"sink": 0}, "sink must be True or False"),
        ({"block": "64"}, r"block must be 64 or 128, or a pair \(query rows, key rows\) \(got '64'\)"),
        ({"block": 64.0}, "block must be 64 or 128, or a pair"),
        ({"block": [64]}, "block must be 64 or 128, or a pair"),
        ({"block": [64, 64.0]}, "block must be 64 or 128, or a pair"),
    ],
)
def test_values_of_another_type_are_refused_at_once(arguments, message):
    with pytest.raises(TypeError, match=message):
        RadialProcessor(**arguments)


def test_a_block_may_be_any_pair(tiny_of):
    model = tiny_of("wan")
    processor = RadialProcessor(block=[64, 128], first_steps=0)
    assert processor.block == (64, 128)
    sparsify(model, processor)
    TINY["wan"].forward(model)
    assert processor.report().sparse_calls == 1


def test_fractions_without_a_pipeline(tiny_of):
    """Binding is no mistake: training has no steps. Generating without knowing their number is."""
    model = tiny_of("wan")
    for arguments, message in (
        ({}, r"first_steps=0\.24 is a fraction .* pass num_steps="),
        ({"first_steps": 0, "last_steps": 1}, "last_steps needs the number of steps"),
    ):
        sparsify(model, RadialProcessor(**arguments))
        with pytest.raises(ValueError, match=message):
            TINY["wan"].forward(model, (1, 4, 4))
    for arguments in ({"num_steps": 10}, {"first_steps": 2}):
        sparsify(model, RadialProcessor(**arguments))
        TINY["wan"].forward(model, (1, 4, 4))


def test_a_transformer_split_over_devices():
    model = TINY["wan"].build()
    model.hf_device_map = {"blocks.0": 0, "blocks.1": "cpu"}
    sparsify(model, DenseProcessor())
    model.hf_device_map = {"blocks.0": 0, "blocks.1": 1}
    with pytest.raises(NotImplementedError, match=r"split over devices 0, 1 by device_map.*Load it on one device"):
        sparsify(model, DenseProcessor())


def test_one_processor_for_two_pipelines(pipe_of):
    first, second = pipe_of("wan"), pipe_of("wan_v2v")
    processor = RadialProcessor()
    sparsify(first, processor)
    with pytest.raises(ValueError, match="is bound to another WanTransformer3DModel; make a second one"):
        sparsify(second, processor)
    restore(first)
    sparsify(second, processor)
    assert "wan2.1" in repr(processor)


def test_a_report_before_any_run(pipe_of):
    processor = RadialProcessor()
    with pytest.raises(RuntimeError, match="RadialProcessor has no run to report on"):
        processor.report()
    sparsify(pipe_of("wan"), processor)
    with pytest.raises(RuntimeError, match="no run to report on"):
        processor.report()


def test_a_block_without_its_transformer():
    model = TINY["wan"].build()
    sparsify(model, DenseProcessor())
    with pytest.raises(RuntimeError, match="call the transformer itself"):
        model.blocks[0].attn1(torch.zeros(1, 4, 24))


def test_image_latents_instead_of_video(tiny_of):
    model = tiny_of("wan")
    sparsify(model, DenseProcessor())
    with pytest.raises(ValueError, match=r"hidden_states must be \[batch, channels, .*unsqueeze\(2\)"):
        model(torch.zeros(1, 16, 4, 4), torch.zeros(1), torch.zeros(1, 4, 32))


def test_a_token_order_of_another_model_or_grid(tiny_of, monkeypatch):
    from dataclasses import replace

    from videosparse.ordering import TokenOrder
    from videosparse.policies.radial import RadialPolicy

    plan = RadialPolicy.plan
    for grid, codes, got in (((5, 15, 25), (1, 2, 3), "3 heads"), ((5, 15, 24), (1, 2), "2 heads on grid 5x15x24")):
        order = TokenOrder(videosparse.VideoGrid(*grid), codes)
        monkeypatch.setattr(RadialPolicy, "plan", lambda *a, order=order, **k: replace(plan(*a, **k), order=order))
        sparsify(tiny_of("wan"), RadialProcessor(first_steps=0, first_layers=0))
        with pytest.raises(ValueError, match=f"TokenOrder is for {got}"):
            TINY["wan"].forward(tiny_of("wan"))


def test_stock_processors_pass_through(pipe_of):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    pipe, kind = PIPES["wan"].build(), PIPES["wan"]
    stock = kind.run(pipe)
    pipe.set_attn_processor(RadialProcessor())
    pipe.set_attn_processor(WanAttnProcessor())
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(kind.run(pipe), stock)
    pipe.set_attn_processor(RadialProcessor())
    named = {f"blocks.{i}.attn{n}.processor": WanAttnProcessor() for i in range(2) for n in (1, 2)}
    pipe.set_attn_processor(named)
    assert len(named) == 4
    assert pipe.transformer.blocks[1].attn1.processor is named["blocks.1.attn1.processor"]
    with pytest.raises(TypeError, match="takes no stock processors"):
        pipe_of("mochi").set_attn_processor(WanAttnProcessor())


def test_what_repr_shows(pipe_of):
    processor = RadialProcessor(decay=0.5)
    assert repr(processor) == "RadialProcessor(decay=0.5)"
    sparsify(pipe_of("wan"), processor)
    shown = repr(processor)
    assert re.search(r"decay=0\.5, .*block=\(128, 64\).*first_steps=0\.24.*first_layers=1", shown)
    assert shown.endswith(" on wan2.1 (WanTransformer3DModel, 2 layers)")
    restore(pipe_of("wan"))
    assert repr(processor) == "RadialProcessor(decay=0.5)"
    assert repr(DenseProcessor()) == "DenseProcessor()"
