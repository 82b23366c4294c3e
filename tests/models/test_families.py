"""Every family in `FAMILIES`, through its tiny transformers: a new family is tested as soon as `pipes.TINY` has one."""

from pipes import TINY, assert_as_accurate

import pytest
import torch

import videosparse
from videosparse import BlockMap, DenseProcessor, RadialProcessor, restore, sparsify
from videosparse.models import FAMILIES, family_of, model_variant
from videosparse.policies.base import LayerPlan, Mode
from videosparse.reference import attention_reference

EVERY = pytest.mark.parametrize("name", TINY)
JOINT = pytest.mark.parametrize("name", [n for n, tiny in TINY.items() if FAMILIES[tiny.family].joint])
SPARSE = {"decay": 0.2, "first_steps": 0, "first_layers": 0, "sink": False}


def test_every_family_has_a_tiny_transformer():
    assert {tiny.family for tiny in TINY.values()} == set(FAMILIES)
    assert all(family.name == name for name, family in FAMILIES.items())


@EVERY
def test_dense_equals_stock(name, tiny_of):
    model, grid = tiny_of(name), (3, 4, 5)
    stock = TINY[name].forward(model, grid)
    sparsify(model, DenseProcessor())
    dense = TINY[name].forward(model, grid)
    torch.testing.assert_close(dense, stock, rtol=0, atol=1e-5)
    restore(model)
    assert torch.equal(TINY[name].forward(model, grid), stock)


@EVERY
def test_a_full_map_equals_dense(name, tiny_of, monkeypatch):
    """Exercises the gap before text: with every block kept, sparse attention is dense attention."""
    model = tiny_of(name)
    stock = TINY[name].forward(model)

    def full(policy, layout, run, layer, state, *, device, samples, heads):
        aligned = layout.aligned((64, 64))
        return LayerPlan(Mode.SPARSE, aligned, BlockMap.full(aligned, (64, 64), device).index())

    monkeypatch.setattr("videosparse.policies.radial.RadialPolicy.plan", full)
    processor = RadialProcessor(**SPARSE)
    sparsify(model, processor)
    torch.testing.assert_close(TINY[name].forward(model), stock, rtol=0, atol=1e-5)
    assert processor.report().sparse_calls == len(family_of(model).attentions(model))


@EVERY
def test_sparse_equals_the_reference_with_the_block_map(name, tiny_of, monkeypatch):
    model = tiny_of(name)
    stock = TINY[name].forward(model)
    processor = RadialProcessor(**SPARSE)
    sparsify(model, processor)
    sparse = TINY[name].forward(model)
    policy, report = processor.binding.resolved.policy, processor.report()
    assert report.density < 0.9
    assert report.video_density <= report.density
    assert (sparse - stock).abs().max() > 1e-4

    def reference(q, k, v, *, layout, index, order, options):
        block_map = policy.block_map(videosparse.TokenLayout(layout.grid, layout.text))
        return attention_reference(q, k, v, layout=layout, block_map=block_map)[0]

    monkeypatch.setattr("videosparse.processors.attend", reference)
    torch.testing.assert_close(TINY[name].forward(model), sparse, rtol=0, atol=1e-5)
    block_map = policy.block_map(processor.binding.record.layout)
    assert min(block_map.keep.shape[2:]) >= 12
    assert videosparse.TokenLayout(report.grid, 1).aligned(policy.block).text_start > report.grid.tokens, (
        "no gap to test"
    )
    assert report.density == pytest.approx(block_map.density)
    assert report.video_density == pytest.approx(block_map.video_density(processor.binding.record.layout))


@EVERY
def test_samples_of_a_batch_do_not_see_each_other(name, tiny_of):
    model, tiny = tiny_of(name), TINY[name]
    sparsify(model, RadialProcessor(**SPARSE))
    torch.manual_seed(1)
    inputs = tiny.inputs((5, 15, 25), 2, [12, 7])
    with torch.no_grad():
        both = model(**inputs, return_dict=False)[0]
        second = model(**{key: value[1:] for key, value in inputs.items()}, return_dict=False)[0]
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-5)


@JOINT
@pytest.mark.parametrize("processor", [DenseProcessor, lambda: RadialProcessor(**SPARSE)], ids=["dense", "sparse"])
def test_padding_never_leaks(name, processor, tiny_of):
    """Whatever stands in padded text, not one bit of the video changes.

    The models themselves keep it out of their text embedding: HunyuanVideo's refiner and pooled mean, and Mochi's
    pooled embedding, are masked upstream (up to rounding, as sums run over 0 times the padding: so finite values).
    """
    model, tiny = tiny_of(name), TINY[name]
    sparsify(model, processor())
    torch.manual_seed(1)
    inputs = tiny.inputs((3, 8, 9), 3, [12, 7, 1])
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        padded = inputs["encoder_attention_mask"] == 0
        inputs["encoder_hidden_states"][padded] += 3
        after = model(**inputs, return_dict=False)[0]
        inputs["encoder_hidden_states"][~padded] += 3
        other = model(**inputs, return_dict=False)[0]
    assert torch.equal(before, after)
    assert not torch.equal(before, other)


@JOINT
def test_text_without_one_valid_token(name, tiny_of):
    if name == "hunyuan_video":
        pytest.skip("its pooled text is a mean over valid tokens: upstream divides by zero")
    model, tiny = tiny_of(name), TINY[name]
    stock = tiny.forward(model, (3, 4, 5), (0, 12))
    sparsify(model, DenseProcessor())
    torch.testing.assert_close(tiny.forward(model, (3, 4, 5), (0, 12)), stock, rtol=0, atol=1e-5)
    sparsify(model, RadialProcessor(**SPARSE))
    assert tiny.forward(model, text=(0, 12)).isfinite().all()


@EVERY
def test_bfloat16_is_as_close_to_full_precision_as_stock(name):
    tiny = TINY[name]
    model = tiny.build().to(torch.bfloat16)
    exact = tiny.build()
    exact.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    inputs = tiny.inputs((3, 4, 5), 2, [12, 7])
    inputs = {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}
    with torch.no_grad():
        truth = exact(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}, return_dict=False)[0]
        stock = model(**inputs, return_dict=False)[0]
        sparsify(model, DenseProcessor())
        ours = model(**inputs, return_dict=False)[0]
    assert_as_accurate(ours, stock, truth)


@EVERY
def test_attentions_are_named_in_depth_order(name, tiny_of):
    model = tiny_of(name)
    found = family_of(model).attentions(model)
    modules = dict(model.named_modules())
    assert all(modules[a.name] is a.module for a in found)
    assert not [a.name for a in found if "refiner" in a.name or "attn2" in a.name]
    main = [a.depth for a in found if not a.name.startswith("vace_")]
    assert main == list(range(len(main)))


def test_vace_blocks_have_the_depth_of_the_block_they_hint_at(tiny_of):
    model = tiny_of("wan_vace")
    depths = {a.name: a.depth for a in FAMILIES["wan"].attentions(model)}
    assert depths["vace_blocks.1.attn1"] == depths["blocks.2.attn1"] == 2
    processor = RadialProcessor(decay=0.2, first_steps=0, first_layers=1, sink=False)
    sparsify(model, processor)
    TINY["wan_vace"].forward(model)
    assert (processor.report().dense_calls, processor.report().sparse_calls) == (2, 3)


def test_hunyuan_single_blocks_follow_the_dual_ones():
    model = TINY["hunyuan_video"].build(num_layers=2, num_single_layers=2)
    names = [a.name for a in FAMILIES["hunyuan_video"].attentions(model)]
    assert names[1:3] == ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]


def test_values_of_single_blocks_are_not_copied_without_a_gap(tiny_of, monkeypatch):
    model = tiny_of("hunyuan_video")
    sparsify(model, DenseProcessor())
    attention = model.single_transformer_blocks[0].attn
    made, used = [], []
    handle = attention.to_v.register_forward_hook(lambda *a: made.append(a[2]))
    core = attention.processor.core
    monkeypatch.setattr(attention.processor, "core", lambda q, k, v, plan: used.append(v) or core(q, k, v, plan))
    TINY["hunyuan_video"].forward(model, (3, 4, 5))
    handle.remove()
    assert used[0].data_ptr() == made[0].data_ptr()


@EVERY
def test_layout_from_the_roots_inputs(name, tiny_of):
    model, tiny = tiny_of(name), TINY[name]
    layout = family_of(model).layout(model.config, tiny.inputs((3, 4, 5), 2, [12, 7]))
    assert str(layout.grid) == "3x4x5"
    if FAMILIES[tiny.family].joint:
        assert (layout.text, layout.text_start) == (12, 60)
        assert layout.seq_lens.dtype == torch.int32
        assert layout.seq_lens.tolist() == [72, 67]
    else:
        assert (layout.text, layout.seq_lens) == (0, None)


def test_inputs_may_come_in_order(tiny_of):
    """As positional arguments, which the pipelines never use but a training loop may."""
    model = tiny_of("wan")
    processor = DenseProcessor()
    sparsify(model, processor)
    inputs = TINY["wan"].inputs((3, 4, 5), 1, [])
    with torch.no_grad():
        model(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    assert str(processor.report().grid) == "3x4x5"


@pytest.mark.parametrize(
    ("config", "experts", "variant"),
    [
        ({"_class_name": "WanTransformer3DModel", "in_channels": 16}, 1, "wan2.1"),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 36}, 2, "wan2.2-a14b"),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 48}, 1, "wan2.2-5b"),
        ({"_class_name": "WanVACETransformer3DModel", "in_channels": 16}, 1, "wan2.1"),
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, 1, "hunyuan-video"),
        ({"_class_name": "MochiTransformer3DModel"}, 1, "mochi"),
    ],
)
def test_variants_from_configurations(config, experts, variant):
    assert model_variant(config, experts=experts) == variant


def test_an_unknown_configuration_is_refused():
    with pytest.raises(ValueError, match="UNet3D, which is not supported; supported transformers: WanTransformer3DM"):
        model_variant({"_class_name": "UNet3D"})
