"""Pixels: right shape, right colour, right place, the same batched or alone, whole or in parts."""

import math
import random

import pytest
import torch

from videosparse.synthetic import render as render_module
from videosparse.synthetic.render import render, signed_distance, states
from videosparse.synthetic.scene import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    SHAPES,
    Background,
    Occluder,
    Scene,
    SceneObject,
    sample_background,
    sample_scene,
)

GREY = Background("flat", "grey", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def still(shape="circle", colour="red", size="large", x=0.5, y=0.5):
    return SceneObject(shape, colour, size, "static", "medium", x, y)


def one(scene, **choice):
    return render([scene], *choice.pop("shape", (1, 64, 64)), **choice)[0]


def changed(video):
    """Where a frame [3, 1, H, W] is not plain grey."""
    return (video[:, 0] - 0.5).abs().sum(dim=0) > 0.02


def test_clips_are_rgb_in_the_unit_interval():
    rng = random.Random(0)
    video = render([sample_scene(rng) for _ in range(6)], 5, 48, 56)
    assert video.shape == (6, 3, 5, 48, 56)
    assert video.dtype == torch.float32
    assert video.min() >= 0
    assert video.max() <= 1


def test_a_batch_equals_its_clips_whatever_fits_into_a_pass(monkeypatch):
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(9)]
    alone = torch.cat([render([scene], 3, 32, 32) for scene in scenes])
    together = render(scenes, 3, 32, 32)
    monkeypatch.setattr(render_module, "PIXELS_PER_PASS", {"cpu": 2 * 3 * 32 * 32})
    parts = render(scenes, 3, 32, 32)
    assert torch.equal(together, parts)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_clip_may_start_at_any_time():
    rng = random.Random(2)
    scenes = [sample_scene(rng) for _ in range(4)]
    torch.testing.assert_close(render(scenes, 12, 32, 32)[:, :, 8:], render(scenes, 4, 32, 32, start=0.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_of_an_object_has_its_colour(shape):
    for name, colour in COLOURS.items():
        video = one(Scene((still(shape, name),), GREY))
        assert torch.allclose(video[:, 0, 32, 32], torch.tensor(colour), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_reaches_exactly_as_far_as_its_outline_says(shape):
    mask = changed(one(Scene((still(shape),), GREY), shape=(1, 256, 256)))
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    outline, radius = OUTLINES[shape], 0.18 * 256
    assert abs(128 - int(rows[0]) - outline.up * radius) < 1.5
    assert abs(int(rows[-1]) + 1 - 128 - outline.down * radius) < 1.5
    assert abs(int(columns[-1]) + 1 - 128 - outline.half_width * radius) < 1.5


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_is_a_distance(shape):
    """Its slope is 1 outside, and it is zero at the corners and at the notches."""
    axis = torch.linspace(-2, 2, 201, dtype=torch.float64)
    distance = signed_distance(axis[None, None, :], axis[None, :, None], [OUTLINES[shape]])[0]
    slope = torch.hypot(*torch.gradient(distance, spacing=0.02))
    outside = slope[(distance > 0.05)]
    assert outside.median() == pytest.approx(1.0, abs=1e-3)
    assert outside.quantile(0.98) < 1.01
    outline = OUTLINES[shape]
    for i in range(max(outline.corners, 1)):
        angle = outline.turn + 2 * math.pi * i / max(outline.corners, 1)
        x, y = outline.outer * math.sin(angle), -outline.outer * math.cos(angle)
        at_corner = signed_distance(
            torch.tensor([[x]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64), [outline]
        )
        assert float(at_corner) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_anti_aliased(shape):
    """The total colour moves smoothly with a shift of a part of a pixel."""
    totals = [
        float((one(Scene((still(shape, x=0.5 + shift / 64 / 8),), GREY)) - 0.5).abs().sum()) for shift in range(8)
    ]
    assert max(totals) / min(totals) < 1.01


def test_shapes_keep_their_form_in_a_wide_frame():
    mask = changed(one(Scene((still(),), GREY), shape=(1, 64, 128)))
    rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
    assert abs(int(rows) - int(columns)) <= 1


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_backgrounds_are_what_they_are_called(kind):
    background = sample_background(random.Random(3), kind)
    video = one(Scene((), background), shape=(9, 64, 64))
    spread, moves = float(video[:, 0].std(dim=(1, 2)).max()), float((video[:, 8] - video[:, 0]).abs().mean())
    assert (spread < 1e-6) == (kind == "flat")
    assert (moves > 0.005) == (kind == "stripes")
    levels = ((video[0, 0] - background.first[0]).abs() < 1e-4) | ((video[0, 0] - background.second[0]).abs() < 1e-4)
    assert (levels.float().mean() > 0.7) == (kind != "gradient")


def test_later_objects_and_the_occluder_are_in_front():
    scene = Scene((still(colour="red"), still(colour="blue", size="small")), GREY)
    assert torch.allclose(one(scene)[:, 0, 32, 32], torch.tensor(COLOURS["blue"]), atol=1e-6)
    barred = Scene(scene.objects, GREY, Occluder(0.5, 0.1, (0.2, 0.2, 0.2)))
    assert torch.allclose(one(barred)[:, 0, 32, 32], torch.tensor([0.2, 0.2, 0.2]), atol=1e-6)


def test_states_agree_with_the_pixels():
    rng = random.Random(4)
    for _ in range(6):
        scene = Scene(sample_scene(rng, objects=1).objects, GREY)
        video = render([scene], 6, 96, 96, start=2.0)[0]
        for frame, (state,) in enumerate(states(scene, 6, start=2.0)):
            weight = (video[:, frame] - 0.5).abs().sum(dim=0)
            axis = (torch.arange(96) + 0.5) / 96
            assert float((weight.sum(0) * axis).sum() / weight.sum()) == pytest.approx(state.x, abs=0.004)
            assert float((weight.sum(1) * axis).sum() / weight.sum()) == pytest.approx(state.y, abs=0.004)
            assert state.visible
            assert state.colour == scene.objects[0].colour


def test_hidden_objects_are_not_visible():
    hidden = Scene((still(size="small"),), GREY, Occluder(0.5, 0.3, (0.2, 0.2, 0.2)))
    half = Scene((still(size="small"),), GREY, Occluder(0.65, 0.3, (0.2, 0.2, 0.2)))
    covered = Scene((still(colour="red", size="small"), still(colour="blue")), GREY)
    assert not states(hidden, 1)[0][0].visible
    assert states(half, 1)[0][0].visible
    assert [s.visible for s in states(covered, 1)[0]] == [False, True]


def test_nothing_to_render_is_an_error():
    with pytest.raises(ValueError, match="at least one scene"):
        render([], 1, 8, 8)
    with pytest.raises(ValueError, match="positive num_frames"):
        render([Scene((), GREY)], 0, 8, 8)
