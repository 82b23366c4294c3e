"""Tiny pipelines of all families that take every acceleration, and runs of them with a set of `stack.PARTS`.

Import from a test of generation: its `conftest.py` puts this file on the path. The same runs on a GPU.
"""

import pipes
from contextlib import nullcontext
from itertools import combinations
from pipes import PIPES

import torch

from videosparse.components import targets
from videosparse.generation.methods import make_processor
from videosparse.generation.stack import PARTS, REFUSED, Stack, apply_stack
from videosparse.generation.step_cache import StepCache, step_cached
from videosparse.logits import FarLogits
from videosparse.stretching import context_windows

# heads of 64 as integers need, sides of 16 as FP8 needs, and a block between the first and the last
BUILDS = {
    "wan": ("wan", lambda: pipes.wan(attention_head_dim=64, ffn_dim=64, num_layers=3)),
    "wan22": ("wan22", lambda: two_experts()),
    "hunyuan": (
        "hunyuan_true_cfg",
        lambda: pipes.hunyuan(attention_head_dim=64, rope_axes_dim=(16, 24, 24), num_single_layers=2),
    ),
    "mochi": ("mochi", lambda: pipes.mochi(attention_head_dim=64, num_layers=3)),
}
FAMILIES = ("wan", "hunyuan", "mochi")
STEPS = 5
MAGNITUDES = (1.0, 1.01, 1.01, 0.99, 0.99)
TARGETS = r".*\.(attn|attn1)\.(to_q|to_v)"

# every pair that is not refused is in one of them
SETS = (
    ("sparse", "int8", "first-block", "fp8", "compile", "model", "lora"),
    ("sparse", "int8", "magcache", "fp8", "compile", "group", "lora"),
    ("sparse", "int8", "state", "first-block", "fp8", "group", "lora"),
    ("sparse", "int8", "state", "magcache", "fp8", "model", "lora"),
    ("sparse", "int8", "windows", "compile", "fp8", "model", "lora"),
    ("sparse", "far", "windows", "state", "fp8", "group", "lora"),
    ("sparse", "far", "first-block", "compile", "model", "lora"),
    ("sparse", "far", "magcache", "compile", "group"),
    ("far", "windows", "compile"),
    ("int8", "windows", "state"),
)


def two_experts():
    """A Wan2.2 pipeline of the size above."""
    pipe = pipes.wan22()
    sizes = {"attention_head_dim": 64, "ffn_dim": 64, "num_layers": 3}
    experts = {name: pipes.wan_transformer(seed, **sizes) for seed, name in enumerate(("transformer", "transformer_2"))}
    pipe.register_modules(**experts)
    return pipe


def pairs():
    """All pairs that go together, those with two experts left out: these models have sets of their own."""
    one_model = [part for part in PARTS if part != "experts"]
    return [pair for pair in combinations(one_model, 2) if frozenset(pair) not in REFUSED]


class Stacked:
    """A tiny pipeline with the parts that belong to it; `run` adds those that belong to a run."""

    def __init__(self, family, parts, device="cpu", method=None):
        self.kind, self.parts, self.method = PIPES[BUILDS[family][0]], parts, method
        self.pipe = BUILDS[family][1]().to(torch.bfloat16)
        if "lora" in parts:
            for transformer in targets(self.pipe)[1]:
                add_loras(transformer)
        offload = next((part for part in ("model", "group") if part in parts), "none")
        fp8 = "fp8" if "fp8" in parts else "none"
        apply_stack(self.pipe, Stack(None, fp8, "compile" in parts, offload), torch.device(device))

    def run(self, threshold=1e6, seed=0):
        """(latents, what the step cache did), with the threshold of a step cache; None is a run without."""
        kind = next((part for part in ("first-block", "magcache") if part in self.parts), None)
        cached = kind is not None and threshold is not None
        cache = StepCache(kind, threshold, MAGNITUDES if kind == "magcache" else ()) if cached else None
        self.pipe.set_attn_processor(self._processor())
        sizes = {"height": 128, "width": 128, "num_inference_steps": STEPS}
        if "windows" in self.parts:
            sizes["num_frames"] = 1 + 2 * self._stride()
        with step_cached(self.pipe, cache, STEPS) as count, self._windows():
            latents = self.kind.run(self.pipe, **sizes, generator=torch.Generator().manual_seed(seed))
        return latents.float().cpu(), count

    def _windows(self):
        stride = self._stride()
        return context_windows(self.pipe, stride + 1, stride) if "windows" in self.parts else nullcontext()

    def _stride(self):
        return 6 if type(self.pipe).__name__ == "MochiPipeline" else 4

    def _processor(self):
        options = {"first_steps": 2, "first_layers": 0}
        far = FarLogits(1, alpha=0.5) if "far" in self.parts else None
        if self.method is not None:
            return make_processor(self.method, options | ({"refresh": (3,)} if self.method == "adaspa" else {}), far)
        if "int8" in self.parts:
            options["quant"] = "int8"
        if "state" in self.parts:
            return make_processor("adaspa", {**options, "offload_state": True, "refresh": (3,)}, far)
        if "sparse" in self.parts:
            return make_processor("radial", {**options, "decay": 0.2, "sink": False}, far)
        return make_processor("dense", {"quant": "int8"} if "int8" in self.parts else {}, far)


def add_loras(transformer):
    """Two adapters with weights, as for few steps and a style."""
    from peft import LoraConfig

    for name in ("few-steps", "style"):
        torch.manual_seed(len(name))
        transformer.add_adapter(LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False), adapter_name=name)
    transformer.set_adapters(["few-steps", "style"], [1.0, 0.5])
    transformer.to(torch.bfloat16)


def check(stacked):
    """A run repeats bit by bit, also after another; a step cache skips, and at threshold 0 changes nothing."""
    first, count = stacked.run()
    assert first.isfinite().all()
    other, _ = stacked.run(seed=1)
    again, _ = stacked.run()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if {"first-block", "magcache"} & set(stacked.parts):
        assert 0 < count.skipped < count.forwards
        whole, none = stacked.run(threshold=0.0)
        plain, _ = stacked.run(threshold=None)
        assert none.skipped == 0
        assert torch.equal(whole, plain)
        assert not torch.equal(first, plain)
