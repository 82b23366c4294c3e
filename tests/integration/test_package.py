"""The package itself: its names, and the one method that it adds."""

import subprocess
import sys

import pytest

import videosparse
from videosparse.cases import MODELS
from videosparse.processors import RadialProcessor, model_variant, radial_defaults


def test_every_public_name_is_there():
    assert all(getattr(videosparse, name) is not None for name in videosparse.__all__)
    assert set(videosparse.__all__) <= set(dir(videosparse))
    assert videosparse.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        videosparse.nothing  # noqa: B018  the access is the test


def test_the_method_is_added_once():
    code = (
        "from diffusers import DiffusionPipeline as D; before = set(dir(D)); import importlib, videosparse;"
        "added = D.set_attn_processor; importlib.reload(videosparse);"
        "assert set(dir(D)) - before == {'set_attn_processor'}, set(dir(D)) - before;"
        "assert D.set_attn_processor is added and added.__doc__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "variant", "decay", "first", "layers", "sink"),
    [
        ("wan2.1-14b", "wan2.1", 0.2, 0.24, 1, True),
        ("wan2.1-1.3b", "wan2.1", 0.2, 0.24, 1, True),
        ("wan2.2-a14b", "wan2.2-a14b", 0.8, 0.275, 1, True),
        ("wan2.2-5b", "wan2.2-5b", 0.8, 0.275, 1, True),
        ("hunyuan-video", "hunyuan-video", 0.95, 0.24, 0, False),
        ("mochi", "mochi", 0.95, 0.24, 0, False),
        ("tiny-wan", "wan2.1", 0.2, 0.24, 1, True),
    ],
)
def test_published_defaults(name, variant, decay, first, layers, sink):
    resolved = RadialProcessor().resolve(MODELS[name])
    policy, schedule = resolved.policy, resolved.schedule
    assert model_variant(MODELS[name]) == variant
    assert (policy.decay, policy.sink) == (decay, sink)
    assert (schedule.first_steps, schedule.first_layers, schedule.last_steps) == (first, layers, 0)
    assert (schedule.dense_steps(8)[0], schedule.dense_steps(4)[0]) == (2, 1)


def test_every_model_has_defaults():
    assert all(radial_defaults(spec) for spec in MODELS.values())


def test_what_is_given_wins():
    resolved = RadialProcessor(
        decay=1.0, sink=False, first_steps=2, first_layers=2, last_layers=1, last_steps=1
    ).resolve(MODELS["wan2.1-14b"])
    assert (resolved.policy.decay, resolved.policy.sink) == (1.0, False)
    assert (resolved.schedule.first_steps, resolved.schedule.last_layers) == (2, 1)
