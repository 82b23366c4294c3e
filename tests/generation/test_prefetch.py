"""Group offloading with streams beside a step cache, as far as a CPU has them: hooks, no streams."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import _LAZY_PREFETCH_GROUP_OFFLOADING, LazyPrefetchGroupOffloadingHook

from videosparse._diffusers import settle_prefetch

LAYERS = 4


@pytest.fixture
def offloaded():
    """A transformer whose blocks are offloaded by hooks that wait to see their order, and how often each block ran."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=LAYERS, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    apply_group_offloading(model, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    lazy = LazyPrefetchGroupOffloadingHook()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(lazy, _LAZY_PREFETCH_GROUP_OFFLOADING)
    calls = [0] * LAYERS
    for i, block in enumerate(model.blocks):
        block.attn1.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    return model, calls


def run(model, forwards=3):
    inputs = torch.randn(1, 4, 2, 8, 8), torch.tensor([5]), torch.randn(1, 4, 8)
    with torch.no_grad(), model.cache_context("cond"):
        for _ in range(forwards):
            model(*inputs)


def test_a_step_cache_skips_from_the_first_run_on(offloaded):
    model, calls = offloaded
    settle_prefetch(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    run(model)
    assert calls == [3, 1, 1, 1]


def test_blocks_know_what_comes_next(offloaded):
    model, _ = offloaded
    settle_prefetch(model)
    groups = [block._diffusers_hook.get_hook("group_offloading") for block in model.blocks]
    assert [hook.next_group for hook in groups] == [*(hook.group for hook in groups[1:]), None]
    assert model._diffusers_hook.get_hook(_LAZY_PREFETCH_GROUP_OFFLOADING) is None
    assert all("layer_execution_tracker" not in block._diffusers_hook.hooks for block in model.blocks)
    settle_prefetch(model)  # nothing is left to do


def test_without_such_hooks_nothing_changes():
    model = torch.nn.Linear(2, 2)
    settle_prefetch(model)
    assert not hasattr(model, "_diffusers_hook")
