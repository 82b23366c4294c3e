"""LoRAs for few steps: the schedule of every method and model at 4 to 8 steps, and two of them in one run."""

import folders
import pytest
import torch

from videosparse.cases import MODELS
from videosparse.generation import generate
from videosparse.generation.methods import resolve_method
from videosparse.generation.sources import find_spec


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["radial", "adaspa", "paro"])
@pytest.mark.parametrize(("steps", "dense"), [(4, 1), (6, (1, 2)), (8, 2)])
def test_default_schedules_scale(model, method, steps, dense):
    """One or two dense first steps of four to eight, and no more: most of a short run is sparse, too."""
    source = find_spec(model)
    defaults = source.defaults
    grid = source.grid(defaults.num_frames, defaults.height, defaults.width)
    found = resolve_method(source, grid, method, None, steps)
    assert sum(found.schedule.dense_steps(steps)) in (dense if isinstance(dense, tuple) else (dense,))


@pytest.fixture
def few_steps(tmp_path):
    """Two files of LoRA weights as trainers write them."""
    from diffusers import WanPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    paths = []
    for seed, name in enumerate(("four-steps", "style")):
        transformer = WanPipeline.from_pretrained(folders.save_wan(tmp_path / f"base-{name}")).transformer
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=4, target_modules=r".*attn1\.(to_q|to_v)", init_lora_weights=False))
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(transformer))
        WanPipeline.save_lora_weights(tmp_path / name, transformer_lora_layers=weights)
        paths.append(str(tmp_path / name))
    return tuple(paths)


def test_two_loras_at_four_steps_without_guidance(ask, few_steps):
    asked = {"steps": 4, "guidance": 1.0}
    both = generate(ask(loras=few_steps, lora_scales=(1.0, 0.6), **asked))
    assert both.frames.isfinite().all()
    # 4 steps of one branch, 2 layers: the first step and the first layer are dense
    assert (both.run.report.dense_calls, both.run.report.sparse_calls) == (5, 3)
    assert not torch.equal(both.frames, generate(ask(loras=few_steps[:1], **asked)).frames)
    assert not torch.equal(both.frames, generate(ask(loras=few_steps, **asked)).frames)
    none = generate(ask(loras=few_steps, lora_scales=(0.0, 0.0), **asked))
    torch.testing.assert_close(none.frames, generate(ask(**asked)).frames, rtol=0, atol=1e-4)
