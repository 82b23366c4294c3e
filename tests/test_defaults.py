"""What every method takes where the user says nothing."""

from dataclasses import replace

import pytest

from videosparse import AdaSpaProcessor, PAROProcessor, RadialProcessor
from videosparse.cases import MODELS
from videosparse.defaults import SMALL_FRAME, block_for
from videosparse.layout import VideoGrid

LARGE, SMALL = VideoGrid(5, 16, SMALL_FRAME // 16), VideoGrid(5, 16, SMALL_FRAME // 16 - 1)


def test_small_frames_take_small_blocks():
    assert block_for(None) == block_for(LARGE) == (128, 64)
    assert block_for(SMALL) == (64, 64)


@pytest.mark.parametrize("kind", [RadialProcessor, AdaSpaProcessor, PAROProcessor])
def test_of_every_method_unless_it_is_told(kind):
    usual = (128, 64)
    model = MODELS["wan2.1-14b"]
    assert kind().resolve(model).policy.block == usual
    assert kind().resolve(model, grid=LARGE).policy.block == usual
    assert kind().resolve(model, grid=SMALL).policy.block == (64, 64)
    assert kind(block=128).resolve(model, grid=SMALL).policy.block == (128, 128)


def test_nothing_else_of_radial_depends_on_the_frame():
    for model in MODELS.values():
        usual, small = (RadialProcessor().resolve(model, grid=grid) for grid in (None, SMALL))
        assert small.policy == replace(usual.policy, block=(64, 64))
        assert small.schedule == usual.schedule
