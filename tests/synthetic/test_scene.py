"""Scenes: reproducible, split without overlap, with colours that can be told apart."""

import itertools
import random
from collections import Counter

import pytest
import torch

from videosparse.metrics.blobs import to_lab
from videosparse.synthetic.scene import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SPLITS,
    TONES,
    arrange_scene,
    heldout_triples,
    sample_object,
    sample_scene,
    triples,
)


def draw(count, *, seed=0, **choice):
    rng = random.Random(seed)
    return [sample_scene(rng, **choice) for _ in range(count)]


def test_the_same_seed_gives_the_same_scene():
    assert draw(20) == draw(20)
    assert draw(20) != draw(20, seed=1)


def test_splits_share_no_triple_and_a_tenth_is_held_out():
    assert not set(triples("train")) & set(triples("heldout"))
    assert set(triples("train")) | set(triples("heldout")) == set(triples("any"))
    assert len(triples("heldout")) == len(triples("any")) / 10


def test_held_out_triples_leave_no_colour_shape_or_motion_out():
    for position, names in enumerate((SHAPES, tuple(COLOURS), MOTIONS)):
        counts = Counter(triple[position] for triple in heldout_triples())
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_draw_from_their_split(split):
    seen = {(o.shape, o.colour, o.motion) for scene in draw(150, split=split) for o in scene.objects}
    assert seen <= set(triples(split))


def test_about_a_quarter_of_the_scenes_have_two_objects_and_few_an_occluder():
    scenes = draw(600)
    assert 0.19 < sum(len(s.objects) == 2 for s in scenes) / 600 < 0.31
    assert 0.01 < sum(s.occluder is not None for s in scenes) / 600 < 0.09


def test_two_objects_differ_in_colour():
    assert all(s.objects[0].colour != s.objects[1].colour for s in draw(60, objects=2))


def test_colours_are_far_from_one_another_and_from_grey():
    lab = to_lab(torch.tensor(list(COLOURS.values())).T).T
    distances = [float((a - b).norm()) for a, b in itertools.combinations(lab, 2)]
    assert min(distances) > 35
    assert float(lab[:, 1:].norm(dim=1).min()) > 35


def test_backgrounds_are_near_grey_and_their_two_tones_differ():
    for first, second in TONES.values():
        lab = to_lab(torch.tensor([first, second]).T).T
        assert float(lab[:, 1:].norm(dim=1).max()) < 5
        assert float(lab[1, 0] - lab[0, 0]) > 15


def test_arranged_scenes_hold_what_was_asked_for():
    scene = arrange_scene(random.Random(0), [("star", "blue", "orbit"), ("square", "red", "static")], "stripes")
    assert [(o.shape, o.colour, o.motion) for o in scene.objects] == [
        ("star", "blue", "orbit"),
        ("square", "red", "static"),
    ]
    assert scene.background.kind == "stripes"


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="split must be one of train, heldout, any"):
        sample_scene(random.Random(0), split="test")
    with pytest.raises(ValueError, match="objects must be 1 or 2 \\(got 3\\)"):
        sample_scene(random.Random(0), objects=3)
    with pytest.raises(ValueError, match="motion must be one of static, linear"):
        sample_object(random.Random(0), "circle", "red", "spin")
    with pytest.raises(ValueError, match="1 or 2 objects \\(got 0\\)"):
        arrange_scene(random.Random(0), [], "flat")
