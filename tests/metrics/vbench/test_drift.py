"""Clips of two seconds and the drift curve, on videos whose course is known."""

import math

import footage
import pytest
import torch

from videosparse.metrics.vbench import Context
from videosparse.metrics.vbench.drift import DriftCurve, clip_bounds, clips, colours, drift, mean_curve
from videosparse.metrics.video import as_video


def phases(*colours, frames=8, fps=4):
    """Flat colours one after the other, `frames` each."""
    video = torch.cat([torch.tensor(c).view(1, 3, 1, 1).expand(frames, 3, 16, 16) for c in colours])
    return as_video(video.contiguous(), fps)


def test_clips_of_two_seconds():
    assert clip_bounds(footage.still(96, 16)) == [(0, 32), (32, 64), (64, 96)]
    # 81 frames: the last 17 reach back to make a whole clip
    assert clip_bounds(footage.still(81, 16)) == [(0, 32), (32, 64), (49, 81)]
    assert clip_bounds(footage.still(20, 16)) == [(0, 20)]
    assert [len(clip) for clip in clips(footage.still(81, 16))] == [32, 32, 32]
    with pytest.raises(ValueError, match="Clips need at least 2 frames"):
        clip_bounds(footage.still(4, 16, fps=0.5))


def test_drift_of_colours():
    red, green = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    curve = drift(phases(red, red, green, red), "colour")
    assert curve.seconds == (0, 2, 4, 6)
    assert curve.cosine == pytest.approx((1, 1, 0, 1))
    # a clip that is half red: its mean feature is (1, 1) / 2
    mixed = phases(red, red, red, green, frames=4)
    assert drift(mixed, "colour").cosine == pytest.approx((1, 1 / math.sqrt(2)))
    assert drift(phases(red), "colour") is None


def test_histograms_count_every_pixel():
    video = footage.cut(4, size=16)
    found = colours(video)
    assert found.shape == (4, 512)
    assert found[0].tolist().index(1) == 0
    assert found[-1].tolist().index(1) == 511


def test_drift_of_learned_features(models):
    video = phases((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    context = Context(models)
    curve = drift(video, "dino", context)
    features = models.features("dino", video)
    assert curve.cosine == pytest.approx((1, float(features[0] @ features[8]), 1), abs=1e-5)


def test_an_unknown_feature():
    with pytest.raises(ValueError, match="Unknown feature 'smell'"):
        drift(footage.still(64, 16), "smell")


def test_means_at_each_distance():
    curves = [DriftCurve("colour", (0, 2, 4), (1, 0.8, 0.6)), DriftCurve("colour", (0, 2), (1, 0.6))]
    assert mean_curve(curves) == [(0, 1, 2), (2, pytest.approx(0.7), 2), (4, 0.6, 1)]
