"""Small models, data sets and configurations for tests of LoRA training; found through the path of `conftest.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from videosparse.training.config import Config, parse_config


def save_wan(folder: Path) -> Path:
    """As in the tests of generation; see there."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("generation_folders", Path(__file__).parents[1] / "generation" / "folders.py")
    folders = module_from_spec(spec)
    spec.loader.exec_module(folders)
    return folders.save_wan(folder, heads=2, head_dim=24, layers=3)


def save_pipe(name: str, folder: Path) -> Path:
    """A random-weight pipeline of `tests/pipes.py`, saved."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("pipes", Path(__file__).parents[1] / "pipes.py")
    pipes = sys.modules.setdefault("pipes", module_from_spec(spec))
    if not hasattr(pipes, "PIPES"):
        spec.loader.exec_module(pipes)
    pipes.PIPES[name].build().save_pretrained(folder)
    return folder


def random_data(folder: Path, model: Path, *, clips: int = 8, frames: int = 33, size: int = 32) -> Path:
    """A data set of random latents and texts, as `prepare` would write it."""
    from safetensors.torch import save_file

    from videosparse.generation.sources import find_model
    from videosparse.training.clips import Size
    from videosparse.training.dataset import EMPTY, packed, write_shard
    from videosparse.training.encoding import describe_folder
    from videosparse.training.families import TRAINING_FAMILIES

    source = find_model(str(model))
    describe_folder(folder, source, float(source.defaults.fps))
    family = TRAINING_FAMILIES[source.spec.family]
    time, space = source.spec.stride
    g = torch.Generator().manual_seed(0)
    config = source.config
    shape = (config["in_channels"], (frames - 1) // time + 1, size // space, size // space)

    def text() -> dict[str, torch.Tensor]:
        if family.name == "wan":
            return {"encoder_hidden_states": torch.randn(6, config["text_dim"], generator=g)}
        words = {
            "encoder_hidden_states": torch.randn(12, config["text_embed_dim"], generator=g),
            "encoder_attention_mask": (torch.arange(12) < 7).long(),
        }
        if family.name == "hunyuan_video":
            words["pooled_projections"] = torch.randn(config["pooled_projection_dim"], generator=g)
        return words

    made = [(f"{n:024x}", f"clip {n}", "a clip", torch.randn(shape, generator=g), text()) for n in range(clips)]
    write_shard(folder, Size(frames, size, size), made, torch.float32)
    save_file(packed(text(), torch.float32), folder / EMPTY)
    return folder


def make_config(model: Path, data: Path, out: Path, **sections: dict[str, Any]) -> Config:
    """A run of a few seconds."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "data": {"path": str(data), "holdout": 2},
        "lora": {"rank": 4, "alpha": 8.0},
        "attention": {"first_steps": 0.3, "first_layers": 1},
        "train": {"frames": [17, 33], "steps": 6, "lr": 1e-2, "warmup": 1, "checkpointing": False},
        "output": {"folder": str(out), "save_every": 3},
    }
    for name, given in sections.items():
        values.setdefault(name.rstrip("_"), {}).update(given)  # data_ where data is an argument of its own
    return parse_config(values)
