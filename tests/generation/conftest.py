"""Small model folders, saved once."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).parent)]

# by its path, not by its name: Python 3.11 has a module of that name in its library
_PIPES = Path(__file__).parents[1] / "pipes.py"
if getattr(sys.modules.get("pipes"), "__file__", None) != str(_PIPES):
    _spec = spec_from_file_location("pipes", _PIPES)
    sys.modules["pipes"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["pipes"])

import folders  # noqa: E402  found through the path above


@pytest.fixture(scope="session", autouse=True)
def _offline():
    """No test may reach the hub, even by a name that looks like a hub id."""
    patch = pytest.MonkeyPatch()
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random-weight WanPipeline folder; see `folders.save_wan`."""
    return folders.save_wan(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def ask(model_folder):
    """`ask(prompt=..., **fields)`: a request that runs in a fraction of a second."""
    from videosparse.generation import GenerationRequest

    def make(prompt=folders.PROMPT, **fields):
        small = {"num_frames": 9, "height": 64, "width": 64, "steps": 2, "device": "cpu", "model": str(model_folder)}
        return GenerationRequest(prompt, **{**small, **fields})

    return make


@pytest.fixture(scope="session")
def make_lora(model_folder, tmp_path_factory):
    """`make_lora(seed, about)`: the folder of a random LoRA for the small model."""
    from diffusers import WanPipeline, WanTransformer3DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def make(seed=0, about=folders.ABOUT):
        folder = tmp_path_factory.mktemp("lora") / f"lora{seed}"
        model = WanTransformer3DModel.from_pretrained(model_folder / "transformer")
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=r"blocks\.\d+\.attn1\.to_[qkv]"))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        config = model.peft_config["default"].to_dict()
        layers = get_peft_model_state_dict(model)
        WanPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=config)
        file = folder / "pytorch_lora_weights.safetensors"
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        save_file(load_file(file), file, metadata={**header, **({"videosparse": json.dumps(about)} if about else {})})
        return folder

    return make
