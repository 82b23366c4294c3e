"""Paths: inside the frame for ever, as their motion says, and visible within two seconds."""

import math
import random

import pytest
import torch

from videosparse.synthetic.motion import centres, overlap_shares, path_table
from videosparse.synthetic.scene import MOTIONS, SHAPES, SIZES, SPEEDS, free_area, sample_object

LONG = torch.arange(0, 60, 1 / 16, dtype=torch.float64)
CLIP = torch.arange(33, dtype=torch.float64) / 16


def draw(motion, *, count=40, **choice):
    rng = random.Random(MOTIONS.index(motion))
    return [sample_object(rng, rng.choice(SHAPES), "red", motion, **choice) for _ in range(count)]


def turns(values: torch.Tensor) -> torch.Tensor:
    """How often each sequence [N, T] changes direction."""
    sign = values.diff(dim=1).sign()
    return (sign[:, 1:] * sign[:, :-1] < 0).sum(dim=1)


@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_stay_inside_the_frame(motion):
    objects = draw(motion)
    where = centres(path_table(objects), LONG)
    area = torch.tensor([free_area(o.shape, o.radius) for o in objects], dtype=torch.float64)[:, None]
    slack = 1e-9
    assert (where[..., 0] >= area[..., 0] - slack).all()
    assert (where[..., 0] <= area[..., 1] + slack).all()
    assert (where[..., 1] >= area[..., 2] - slack).all()
    assert (where[..., 1] <= area[..., 3] + slack).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_no_step_between_two_frames_is_too_long_to_follow(motion):
    where = centres(path_table(draw(motion, speed="fast")), LONG)
    assert where.diff(dim=1).norm(dim=-1).max() < 0.17


def test_static_objects_do_not_move():
    where = centres(path_table(draw("static")), LONG)
    assert (where == where[:, :1]).all()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("start", [0.0, 7.3])
def test_linear_objects_keep_their_speed_and_cross_much_of_the_frame(speed, start):
    where = centres(path_table(draw("linear", speed=speed)), start + CLIP)
    steps = where.diff(dim=1).abs()
    # A step that holds a reflection is shorter; the others of one object are all alike.
    assert torch.allclose(steps.median(dim=1).values, steps.amax(dim=1), atol=1e-9)
    assert (steps.sum(dim=1).norm(dim=-1) > 0.6).all()


@pytest.mark.parametrize("speed", SPEEDS)
def test_orbits_keep_their_radius_and_make_half_a_turn(speed):
    objects = draw("orbit", speed=speed)
    where = centres(path_table(objects), 3 + CLIP)
    middle = torch.tensor([(o.x, o.y) for o in objects], dtype=torch.float64)[:, None]
    radius = torch.tensor([o.amplitude for o in objects], dtype=torch.float64)[:, None]
    assert torch.allclose((where - middle).norm(dim=-1), radius.expand(-1, 33))
    turned = (where - middle).diff(dim=1).norm(dim=-1).sum(dim=1) / (2 * math.pi * radius[:, 0])
    assert (turned > 0.5).all()


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("start", [0.0, 11.7])
def test_gravity_bounces_in_every_clip_and_loses_no_height(speed, start):
    objects = draw("gravity", speed=speed)
    table = path_table(objects)
    # Upwards is negative: at a bounce the direction changes at the lowest point, the floor.
    fine = centres(table, start + torch.linspace(0, 2, 800, dtype=torch.float64))[..., 1]
    floor = torch.tensor([o.y for o in objects], dtype=torch.float64)
    assert (floor - fine.amax(dim=1) < 0.005).all()
    assert (turns(fine) >= 2).all()
    top = centres(table, LONG)[..., 1].amin(dim=1)
    height = torch.tensor([o.amplitude for o in objects], dtype=torch.float64)
    assert torch.allclose(floor - top, height, atol=0.01)


@pytest.mark.parametrize("speed", SPEEDS)
def test_zigzags_turn_at_least_twice_while_they_travel(speed):
    where = centres(path_table(draw("zigzag", speed=speed)), 5 + torch.linspace(0, 2, 400, dtype=torch.float64))
    assert (turns(where[..., 1]) >= 2).all()
    assert (where[..., 0].diff(dim=1).abs().sum(dim=1) > 0.4).all()


def test_a_clip_that_starts_later_continues_the_path():
    table = path_table([o for motion in MOTIONS for o in draw(motion, count=3)])
    whole = centres(table, torch.arange(80, dtype=torch.float64) / 16)
    assert torch.equal(whole[:, 40:], centres(table, 40 / 16 + torch.arange(40, dtype=torch.float64) / 16))


def test_objects_on_the_same_path_always_touch():
    thing = draw("orbit", count=1)[0]
    assert overlap_shares([(thing, thing)]) == [1.0]


def test_sizes_are_large_enough_to_see_a_shape_at_64_pixels():
    assert min(SIZES.values()) * 64 >= 7
