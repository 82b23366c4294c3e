"""A tokenizer and a whole pipeline at the smallest sizes."""

from __future__ import annotations

import pytest
import torch

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
