"""What every method takes where the user says nothing."""

import pytest

from videosparse import AdaSpaProcessor, PAROProcessor, RadialProcessor
from videosparse.cases import MODELS
from videosparse.defaults import SMALL_FRAME, block_for, radial_defaults
from videosparse.layout import VideoGrid

LARGE, SMALL = VideoGrid(5, 16, SMALL_FRAME // 16), VideoGrid(5, 16, SMALL_FRAME // 16 - 1)


def test_small_frames_take_small_blocks():
    assert block_for((128, 64), None) == block_for((128, 64), LARGE) == (128, 64)
    assert block_for((128, 64), SMALL) == block_for((128, 128), SMALL) == (64, 64)


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
        usual, small = radial_defaults(model), radial_defaults(model, grid=SMALL)
        assert small.block == (64, 64)
        assert (small.decay, small.sink, small.first_steps) == (usual.decay, usual.sink, usual.first_steps)
