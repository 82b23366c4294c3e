"""A tokenizer and a whole pipeline at the smallest sizes."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent)]

import lora_runs  # noqa: E402  found through the path above

CAPTIONS = [
    "a red circle bounces on a plain dark background",
    "A large blue star orbits quickly over a checker background.",
    "a green triangle and a yellow square drift",
] * 40


@pytest.fixture(scope="session")
def tokenizer():
    from videosparse.training.tiny.text import train_tokenizer

    return train_tokenizer(CAPTIONS, 400)


@pytest.fixture(scope="session")
def pipeline(tokenizer):
    from diffusers import WanPipeline

    from videosparse.training.tiny.export import make_scheduler
    from videosparse.training.tiny.models import SMOKE_SIZES, build_text_encoder, build_transformer, build_vae

    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(SMOKE_SIZES, len(tokenizer)).eval(),
        vae=build_vae(SMOKE_SIZES, [0.5] * 8, [2.0] * 8).eval(),
        transformer=build_transformer(SMOKE_SIZES).eval(),
        scheduler=make_scheduler("unipc"),
    )


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """A random-weight WanPipeline of 3 layers."""
    return lora_runs.save_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="session")
def wan_data(tmp_path_factory, wan_folder):
    """Eight random clips of 33 frames of 32x32 pixels, as encoded for it."""
    return lora_runs.random_data(tmp_path_factory.mktemp("data") / "wan", wan_folder)


@pytest.fixture
def lora_run(wan_folder, wan_data, tmp_path):
    """`lora_run(out="run", **sections)`: a run on these, on the CPU."""
    from videosparse.training.run import LoraRun, make_accelerator

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(out="run", model=wan_folder, data=wan_data, **sections):
        config = lora_runs.make_config(model, data, tmp_path / out, **sections)
        return LoraRun(config, make_accelerator(config, "cpu"))

    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def program(monkeypatch):
    """`program(config, resume, format)` trains as `lora/train_length_extension.py` does; `.module` is that program."""
    path = Path(__file__).parents[2] / "lora" / "train_length_extension.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def train(config, resume=False, format="diffusers"):
        return module.train(config, argparse.Namespace(resume=resume, format=format, device="cpu"))

    train.module = module
    return train
