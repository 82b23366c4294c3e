"""Token orders in whole models and pipelines: with every block kept, they change nothing but the order of sums."""

import random
from dataclasses import dataclass, field, replace
from pipes import PIPES, TINY

import pytest
import torch
from probes import FullMap, Probe

from videosparse import DenseProcessor, sparsify
from videosparse.kernels import KernelOptions
from videosparse.models import base
from videosparse.ordering import TokenOrder
from videosparse.processors import Resolved, model_variant

EVERY = pytest.mark.parametrize("name", TINY)
HEADS = 2


@dataclass(frozen=True, eq=False)
class OrderedMap(FullMap):
    """Every block, and a random order for each head of each layer; another one for each `round`."""

    orders: dict = field(default_factory=dict)
    round: list = field(default_factory=lambda: [0])

    def plan(self, layout, run, layer, state, *, device, **more):
        plan = super().plan(layout, run, layer, state, device=device, **more)
        key = (layout.grid, layer, self.round[0])
        if key not in self.orders:
            self.orders[key] = TokenOrder(layout.grid, tuple(random.Random(str(key)).choices(range(6), k=HEADS)))
        return replace(plan, order=self.orders[key])


@dataclass(frozen=True, eq=False, repr=False)
class Ordered(Probe):
    """Binds an `OrderedMap`."""

    policy: OrderedMap = field(default_factory=OrderedMap)
    options: KernelOptions = field(default_factory=KernelOptions)

    def resolve(self, model, *, experts=1, grid=None):
        return Resolved(model_variant(model, experts=experts), self.policy, self.schedule, self.options)


@EVERY
@pytest.mark.parametrize("fused_norm", ["off", "auto"])
def test_transformers(name, fused_norm, tiny_of, monkeypatch):
    """Step by step, and with torch behind the one op that a GPU takes."""
    fused, real = [], base.norm_rotate
    if fused_norm == "auto":
        monkeypatch.setattr(base, "missing", lambda *a: None)
    monkeypatch.setattr(base, "norm_rotate", lambda *a, **k: fused.append(1) or real(*a, **k))
    model = tiny_of(name)
    sparsify(model, DenseProcessor(fused_norm=fused_norm))
    dense = TINY[name].forward(model, (3, 8, 8))
    fused.clear()
    processor = Ordered(options=KernelOptions(fused_norm=fused_norm))
    sparsify(model, processor)
    ours = TINY[name].forward(model, (3, 8, 8))
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
    assert bool(fused) == (fused_norm == "auto")
    assert len({order.codes for order in processor.policy.orders.values()}) > 1


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_i2v", "hunyuan_true_cfg", "mochi"])
def test_pipelines(name, pipe_of):
    pipe, kind = pipe_of(name), PIPES[name]
    pipe.set_attn_processor(DenseProcessor())
    dense = kind.run(pipe, height=64, width=96)
    pipe.set_attn_processor(Ordered())
    torch.testing.assert_close(kind.run(pipe, height=64, width=96), dense, rtol=0, atol=1e-5)


@EVERY
def test_gradients(name):
    model, twin = TINY[name].build().train(), TINY[name].build().train()
    twin.load_state_dict(model.state_dict())
    for one, processor in ((model, DenseProcessor()), (twin, Ordered())):
        sparsify(one, processor)
        torch.manual_seed(1)
        one(**TINY[name].inputs((3, 4, 5), 2, [12, 7]), return_dict=False)[0].square().mean().backward()
    for (key, x), (_, y) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if x.grad is not None:
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6, msg=key)


@EVERY
@pytest.mark.parametrize("fused_norm", ["auto", "on"])
def test_compiled_blocks_take_new_orders_without_recompiling(name, fused_norm, monkeypatch):
    from videosparse.kernels import norm_op

    monkeypatch.setattr(base, "missing", lambda *a: None)
    monkeypatch.setattr(norm_op, "choose", lambda *a: "torch")
    torch._dynamo.reset()
    model = TINY[name].build()
    sparsify(model, DenseProcessor(fused_norm="off"))
    dense = TINY[name].forward(model, (3, 8, 8))
    processor = Ordered(options=KernelOptions(fused_norm=fused_norm))
    sparsify(model, processor)
    model._repeated_blocks = getattr(model, "_repeated_blocks", None) or ["MochiTransformerBlock"]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for number in range(3):
        processor.policy.round[0] = number
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            torch.testing.assert_close(TINY[name].forward(model, (3, 8, 8)), dense, rtol=0, atol=1e-5)
    assert len(processor.policy.orders) >= 3 * 2
