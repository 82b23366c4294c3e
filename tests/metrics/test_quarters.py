"""Quarters of a video: the truth is right in all of them, and damage shows where it is."""

import random

import pytest
import torch

from videosparse.metrics.quarters import drift, extra_repetition, quarters
from videosparse.synthetic.captions import parse_caption
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import arrange_scene

PROMPT = "a red circle orbits on a plain dark background"


@pytest.fixture(scope="module")
def truth():
    scene = arrange_scene(random.Random(3), (("circle", "red", "orbit"),), "flat")
    return render([scene], 161, 64, 64)[0]


def test_the_truth_is_right_in_every_quarter(truth):
    found = quarters(truth, parse_caption(PROMPT), 16)
    assert [q.right for q in found] == [1.0] * 4
    assert drift(found) == 0
    assert all(q.permanence == 1 for q in found)
    assert extra_repetition(truth, truth, 40) == 0


def test_an_object_that_goes_away_shows_in_its_quarter(truth):
    broken = truth.clone()
    broken[:, 120:] = truth[:, :1, :1, :1]
    found = quarters(broken, parse_caption(PROMPT), 16)
    assert [q.right for q in found[:3]] == [1.0] * 3
    assert found[3].right < 0.5
    assert found[3].permanence == 0
    assert drift(found) > 0.5


def test_a_video_that_starts_again_repeats_itself(truth):
    again = torch.cat([truth[:, :80], truth[:, :81]], 1)
    assert extra_repetition(again, truth, 70) > 0.05
