"""Changed scores of far tokens under every method, in every family: what the model then computes, and refusals."""

from itertools import pairwise
from pipes import TINY

import pytest
import torch
from test_host_features import branches

from videosparse import (
    AdaSpaProcessor,
    DenseProcessor,
    FarLogits,
    PAROProcessor,
    RadialProcessor,
    restore,
    sparsify,
)
from videosparse.blocks import BlockMap
from videosparse.reference import attention_reference

FAR = FarLogits(trained=1, alpha=0.3)  # of the three latent frames of `branches`
SPARSE = {"num_steps": 6, "first_steps": 2, "block": 64}
PROCESSORS = {
    "dense": DenseProcessor,
    "radial": lambda **more: RadialProcessor(**SPARSE, decay=0.2, sink=False, first_layers=0, **more),
    "adaspa": lambda **more: AdaSpaProcessor(**{"density": 0.7, **SPARSE, **more}),
    "paro": lambda **more: PAROProcessor(**{"density": 0.7, **SPARSE, **more}),
}
FAMILIES = ["wan", "hunyuan_video", "mochi"]
EVERY = pytest.mark.parametrize("method", PROCESSORS)


def run(name, model, processor=None):
    """Two branches of two samples, six steps."""
    if processor is not None:
        sparsify(model, processor)
    try:
        return torch.stack(branches(TINY[name], model))
    finally:
        restore(model)


def kept(index, length):
    """The map that lists hold."""
    samples, heads, rows, columns = index.shape
    keep = torch.zeros(samples * heads * rows, columns, dtype=torch.bool)
    for row, (start, end) in enumerate(pairwise(index.row_ptr.tolist())):
        keep[row, index.ids[start:end].long()] = True
    return BlockMap(keep.view(index.shape), index.block, length, length)


def by_reference(q, k, v, *, layout, index=None, order=None, scale=None, return_lse=False, options):
    """`attend` by the oracle."""
    block_map = None if index is None else kept(index, layout.length)
    tokens = None
    if order is not None:
        big, middle, *steps = order.table(q.device).long()[:, 3:, None].unbind(1)
        place = torch.arange(layout.video)
        parts = (place // big, place % big // middle, place % middle)
        tokens = sum(part * step for part, step in zip(parts, steps, strict=True))
        tokens = torch.cat([tokens, torch.arange(layout.video, layout.length).expand(q.shape[2], -1)], 1)
    out, lse = attention_reference(
        *(x.double() for x in (q, k, v)), layout=layout, block_map=block_map, logit=options.logit, tokens=tokens
    )
    if tokens is not None:
        back = tokens.argsort(1)
        out = out.gather(1, back.t()[None, :, :, None].expand_as(out))
        lse = lse.gather(2, back[None].expand_as(lse))
    return (out.to(q.dtype), lse.float()) if return_lse else out.to(q.dtype)


@EVERY
@pytest.mark.parametrize("name", FAMILIES)
def test_every_call_changes_scores(name, method, tiny_of, monkeypatch):
    """Dense steps, searches and sparse calls, against the oracle in their place, and not what they are without."""
    model, processor = tiny_of(name), PROCESSORS[method](logit=FAR)
    found, plain = run(name, model, processor), run(name, model, PROCESSORS[method]())
    assert processor.report().dense_backend == "videosparse torch"
    monkeypatch.setattr("videosparse.processors.attend", by_reference)
    monkeypatch.setattr("videosparse.searching.attend", by_reference)
    expected = run(name, model, PROCESSORS[method](logit=FAR))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["adaspa", "paro"])
def test_maps_that_keep_all_are_dense(method, tiny_of):
    model = tiny_of("wan")
    dense = run("wan", model, DenseProcessor(logit=FAR))
    torch.testing.assert_close(run("wan", model, PROCESSORS[method](density=1.0, logit=FAR)), dense)


@EVERY
def test_short_videos_are_left_alone(method, tiny_of, caplog):
    model = tiny_of("wan")
    with caplog.at_level("INFO", logger="videosparse"):
        found = run("wan", model, PROCESSORS[method](logit=FarLogits(3)))
    assert torch.equal(found, run("wan", model, PROCESSORS[method]()))
    assert "FarLogits(trained=3, alpha=0.9) leaves this video alone: it has 3 latent frames." in caplog.text


@pytest.mark.parametrize("method", ["dense", "radial"])
def test_compiled_blocks(method):
    model = TINY["wan"].build()
    eager = run("wan", model, PROCESSORS[method](logit=FAR))
    model._reset_stateful_cache()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run("wan", model, PROCESSORS[method](logit=FAR)), eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "radial"])
def test_training_is_refused(method, tiny_of):
    model = tiny_of("wan").train()
    try:
        sparsify(model, PROCESSORS[method](logit=FAR))
        with pytest.raises(NotImplementedError, match="logit is for inference: it has no gradient"):
            model(**TINY["wan"].inputs((3, 8, 8), 1, [12]))
    finally:
        model.eval()
        restore(model)


@pytest.mark.parametrize("method", ["dense", "radial"])
def test_a_chosen_backend_excludes_it(method, tiny_of):
    model = tiny_of("wan")
    model.set_attention_backend("_native_math")
    try:
        with pytest.raises(ValueError, match=r"logit=FarLogits\(...\) runs our own kernel, and set_attention_backend"):
            run("wan", model, PROCESSORS[method](logit=FAR))
    finally:
        model.set_attention_backend("native")
        model.reset_attention_backend()


@EVERY
def test_integers_exclude_it(method):
    with pytest.raises(ValueError, match="logit looks at the sign of scores"):
        PROCESSORS[method](logit=FAR, quant="int8")
