"""Captions: every one can be read back, and what a person types is understood."""

import random
from collections import Counter

import pytest

from videosparse.synthetic.captions import (
    MOTION_ADJECTIVES,
    MOTION_PHRASES,
    caption,
    empty_or_caption,
    parse_caption,
)
from videosparse.synthetic.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, sample_scene


def drawn(count):
    rng = random.Random(0)
    for _ in range(count):
        scene = sample_scene(rng, split="any")
        yield scene, caption(scene, rng)


def test_every_caption_says_what_its_scene_shows():
    for scene, text in drawn(1500):
        expected = parse_caption(text)
        assert {(o.shape, o.colour, o.motion) for o in expected.objects} == {
            (o.shape, o.colour, o.motion) for o in scene.objects
        }, text
        assert expected.count == len(scene.objects)
        assert expected.background in (None, scene.background.kind), text
        assert expected.occluder == (scene.occluder is not None), text
        by_colour = {o.colour: o for o in scene.objects}
        for said in expected.objects:
            assert said.size in (None, by_colour[said.colour].size), text
            assert said.speed in (None, by_colour[said.colour].speed), text


def test_backgrounds_are_nearly_always_named_and_size_and_speed_sometimes():
    read = [(parse_caption(text), scene) for scene, text in drawn(600)]
    assert 0.90 < sum(e.background is not None for e, _ in read) / 600 < 0.99
    things = [o for e, _ in read for o in e.objects]
    assert 0.15 < sum(o.size is not None for o in things) / len(things) < 0.5
    assert 0.10 < sum(o.speed is not None for o in things) / len(things) < 0.5


def test_every_motion_has_words_of_its_own():
    words = Counter(p.singular for phrases in MOTION_PHRASES.values() for p in set(phrases))
    assert set(words.values()) == {1}
    for motion in MOTIONS:
        for phrase in MOTION_PHRASES[motion]:
            for text in (phrase.singular, phrase.plural, phrase.participle):
                assert parse_caption(f"a red circle {text}").objects[0].motion == motion
        for adjective in MOTION_ADJECTIVES[motion]:
            assert parse_caption(f"a small {adjective} red circle").objects[0].motion == motion


@pytest.mark.parametrize(
    ("text", "objects", "background"),
    [
        ("a red circle bounces on a checker background", [("circle", "red", "gravity")], "checker"),
        ("A bouncing blue ball, checkerboard.", [("circle", "blue", "gravity")], "checker"),
        ("a yellow star circles around on a plain background", [("star", "yellow", "orbit")], "flat"),
        ("a cyan square moves in a circle", [("square", "cyan", "orbit")], None),
        ("a green circle stands still over moving stripes", [("circle", "green", "static")], "stripes"),
        (
            "a red circle and a blue square zigzag on a smooth gradient",
            [("circle", "red", "zigzag"), ("square", "blue", "zigzag")],
            "gradient",
        ),
        (
            "a violet box drifts while a tiny pink star drops and bounces",
            [("square", "purple", "linear"), ("star", "pink", "gravity")],
            None,
        ),
    ],
)
def test_what_a_person_types(text, objects, background):
    expected = parse_caption(text)
    assert [(o.shape, o.colour, o.motion) for o in expected.objects] == objects
    assert expected.background == background


def test_a_caption_may_leave_the_motion_open():
    assert parse_caption("a red circle").objects[0].motion is None


def test_a_caption_without_an_object_is_an_error():
    with pytest.raises(ValueError, match="must name a colour and a shape"):
        parse_caption("a cat surfing")


def test_a_tenth_of_the_captions_is_empty():
    rng = random.Random(1)
    scene = sample_scene(rng)
    empty = sum(empty_or_caption(scene, rng) == "" for _ in range(2000))
    assert 140 < empty < 260
    assert empty_or_caption(scene, rng, drop=0.0)


def test_the_vocabulary_covers_the_world():
    seen = [parse_caption(text) for _, text in drawn(800)]
    assert {o.shape for e in seen for o in e.objects} == set(SHAPES)
    assert {o.colour for e in seen for o in e.objects} == set(COLOURS)
    assert {o.motion for e in seen for o in e.objects} == set(MOTIONS)
    assert {e.background for e in seen} == {*BACKGROUNDS, None}
