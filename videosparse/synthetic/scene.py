"""What a scene is, and how scenes are drawn at random.

Units: positions, sizes and distances are fractions of the frame (x to the right, y downwards, the frame is the unit
square), times are seconds, angles are radians unless a name says turns. Radii are fractions of the shorter side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

RGB = tuple[float, float, float]
# Shape, colour and motion of one object.
Triple = tuple[str, str, str]

SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("static", "linear", "orbit", "gravity", "zigzag")
BACKGROUNDS = ("flat", "gradient", "checker", "stripes")
SPLITS = ("train", "heldout", "any")

# At least 37 apart in CIELAB, and at least 40 from the grey axis on which every background lies.
COLOURS: dict[str, RGB] = {
    "red": (214 / 255, 32 / 255, 38 / 255),
    "orange": (248 / 255, 134 / 255, 20 / 255),
    "yellow": (246 / 255, 224 / 255, 36 / 255),
    "green": (36 / 255, 160 / 255, 56 / 255),
    "cyan": (20 / 255, 205 / 255, 222 / 255),
    "blue": (24 / 255, 92 / 255, 224 / 255),
    "purple": (128 / 255, 34 / 255, 158 / 255),
    "pink": (250 / 255, 100 / 255, 186 / 255),
}

SIZES: dict[str, float] = {"small": 0.11, "medium": 0.145, "large": 0.18}


@dataclass(frozen=True)
class Speed:
    """How fast each kind of motion goes at one of the three speeds.

    Args:
        linear: speed along the line, frames widths per second.
        orbit: turns per second.
        gravity: bounces per second.
        zigzag: zig-zags (two turns each) per second.
        travel: sideways speed of a zig-zag, frame widths per second.
    """

    linear: float
    orbit: float
    gravity: float
    zigzag: float
    travel: float


# Within 33 frames at 16 per second (2 s) the slow ones still show: more than half a turn, one bounce, three turns.
SPEEDS: dict[str, Speed] = {
    "slow": Speed(linear=0.36, orbit=0.32, gravity=0.72, zigzag=0.85, travel=0.28),
    "medium": Speed(linear=0.54, orbit=0.50, gravity=0.90, zigzag=1.15, travel=0.38),
    "fast": Speed(linear=0.80, orbit=0.76, gravity=1.12, zigzag=1.55, travel=0.50),
}
SPEED_JITTER = 0.08

TONES: dict[str, tuple[RGB, RGB]] = {
    "dark": ((0.12, 0.125, 0.14), (0.33, 0.335, 0.35)),
    "grey": ((0.37, 0.375, 0.385), (0.59, 0.59, 0.595)),
    "light": ((0.70, 0.70, 0.71), (0.93, 0.93, 0.92)),
}


@dataclass(frozen=True)
class Outline:
    """A shape of nominal radius 1, centred where it rotates.

    Args:
        corners: corners of the regular polygon or star; 0 for the circle.
        outer: distance of the corners (or of the rim) from the centre.
        inner: distance of the notches between two corners; for a convex polygon, of its sides.
        turn: rotation in radians; at 0 a corner points up.
        half_width: extent to the left and to the right.
        up: extent upwards.
        down: extent downwards.
    """

    corners: int
    outer: float
    inner: float
    turn: float
    half_width: float
    up: float
    down: float


def _polygon(corners: int, outer: float, *, notch: float | None = None, flat_top: bool = False) -> Outline:
    """The outline of a regular polygon, or of a star whose notches lie at ``notch * outer``."""
    inner = outer * (math.cos(math.pi / corners) if notch is None else notch)
    turn = math.pi / corners if flat_top else 0.0
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    across = [outer * math.sin(a) for a in angles]
    upwards = [outer * math.cos(a) for a in angles]
    return Outline(corners, outer, inner, turn, max(across), max(upwards), -min(upwards))


# The areas are within a factor of 1.5 of one another, so that size says nothing about shape.
OUTLINES: dict[str, Outline] = {
    "circle": Outline(0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0),
    "square": _polygon(4, 1.23, flat_top=True),
    "triangle": _polygon(3, 1.32),
    "star": _polygon(5, 1.32, notch=0.47),
}


@dataclass(frozen=True)
class SceneObject:
    """One moving shape. ``synthetic.motion`` says how the numbers below make a path.

    Args:
        shape: one of ``SHAPES``.
        colour: a key of ``COLOURS``.
        size: a key of ``SIZES``.
        motion: one of ``MOTIONS``.
        speed: a key of ``SPEEDS``; "medium" and without effect for a static object.
        x: where the object starts; for an orbit, its centre.
        y: where the object starts; for an orbit, its centre; for gravity, the floor; for a zig-zag, its middle line.
        vx: sideways speed, reflected at the walls.
        vy: downward speed, reflected at the walls.
        amplitude: radius of an orbit, height of a bounce, half the height of a zig-zag; else 0.
        rate: turns, bounces or zig-zags per second (an orbit with a negative rate turns the other way); else 0.
        phase: where in its cycle the object is at time 0, in cycles.
    """

    shape: str
    colour: str
    size: str
    motion: str
    speed: str
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    amplitude: float = 0.0
    rate: float = 0.0
    phase: float = 0.0

    @property
    def radius(self) -> float:
        """Nominal radius, a fraction of the frame's shorter side."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Background:
    """What is behind the objects: two near-grey tones and how they are laid out.

    Args:
        kind: one of ``BACKGROUNDS``.
        tone: a key of ``TONES``.
        first: RGB in [0, 1]; all of a flat background.
        second: RGB in [0, 1]; the other end of a gradient, the other cells or stripes.
        angle: direction in which a gradient rises, or across the stripes, in radians.
        period: length of two cells of the checker, or of two stripes.
        velocity: how fast stripes move, in frame widths per second.
    """

    kind: str
    tone: str
    first: RGB
    second: RGB
    angle: float = 0.0
    period: float = 0.25
    velocity: float = 0.0


@dataclass(frozen=True)
class Occluder:
    """A vertical neutral bar in front of everything: its middle, its width and its RGB."""

    x: float
    width: float
    colour: RGB


@dataclass(frozen=True)
class Scene:
    """Objects (later ones in front of earlier ones), a background and perhaps an occluder, for every time t >= 0."""

    objects: tuple[SceneObject, ...]
    background: Background = field(
        default_factory=lambda: Background("flat", "grey", TONES["grey"][0], TONES["grey"][1])
    )
    occluder: Occluder | None = None


def free_area(shape: str, radius: float) -> tuple[float, float, float, float]:
    """Where the centre of a shape may be so that all of it is in the frame: left, right, top, bottom."""
    outline = OUTLINES[shape]
    pad = 0.012
    side, up, down = (radius * extent + pad for extent in (outline.half_width, outline.up, outline.down))
    return side, 1.0 - side, up, 1.0 - down


@cache
def heldout_triples() -> frozenset[Triple]:
    """The 10 % of (shape, colour, motion) triples that training never shows: two a colour, four a shape."""
    colours = list(COLOURS)
    return frozenset(
        (SHAPES[(c + j) % len(SHAPES)], colours[c], MOTIONS[(2 * c + j) % len(MOTIONS)])
        for c in range(len(colours))
        for j in range(2)
    )


@cache
def triples(split: str) -> tuple[Triple, ...]:
    """The (shape, colour, motion) triples of a split, in a fixed order.

    Raises:
        ValueError: if the split is none of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)} (got {split!r}).")
    every = ((s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS)
    return tuple(t for t in every if split == "any" or (t in heldout_triples()) == (split == "heldout"))


def sample_object(
    rng: random.Random, shape: str, colour: str, motion: str, *, size: str | None = None, speed: str | None = None
) -> SceneObject:
    """Draw the size, speed and path of an object whose shape, colour and motion are given.

    Raises:
        ValueError: if the motion is none of ``MOTIONS``.
    """
    size = size or rng.choice(list(SIZES))
    speed = "medium" if motion == "static" else speed or rng.choice(list(SPEEDS))
    path = _sample_path(rng, motion, SPEEDS[speed], free_area(shape, SIZES[size]))
    return SceneObject(shape, colour, size, motion, speed, **path)


def _sample_path(
    rng: random.Random, motion: str, speed: Speed, area: tuple[float, float, float, float]
) -> dict[str, float]:
    """The numbers of ``SceneObject`` that describe a path inside ``area``."""
    left, right, top, bottom = area
    jitter = rng.uniform(1 - SPEED_JITTER, 1 + SPEED_JITTER)
    sign = rng.choice((-1.0, 1.0))
    x, y, phase = rng.uniform(left, right), rng.uniform(top, bottom), rng.random()
    if motion == "static":
        return {"x": x, "y": y}
    if motion == "linear":
        angle = rng.uniform(0, 2 * math.pi)
        pace = speed.linear * jitter
        return {"x": x, "y": y, "vx": pace * math.cos(angle), "vy": pace * math.sin(angle)}
    if motion == "orbit":
        reach = min(right - left, bottom - top) / 2
        a = rng.uniform(min(0.18, reach), min(0.27, reach))
        x, y = rng.uniform(left + a, right - a), rng.uniform(top + a, bottom - a)
        return {"x": x, "y": y, "amplitude": a, "rate": sign * speed.orbit * jitter, "phase": phase}
    if motion == "gravity":
        height = rng.uniform(0.34, min(0.50, bottom - top))
        drift = sign * rng.uniform(0.06, 0.26)
        rate = speed.gravity * jitter
        return {"x": x, "y": bottom, "vx": drift, "amplitude": height, "rate": rate, "phase": phase}
    if motion == "zigzag":
        a = rng.uniform(0.11, 0.16)
        y = rng.uniform(top + a, bottom - a)
        travel = sign * speed.travel * jitter
        return {"x": x, "y": y, "vx": travel, "amplitude": a, "rate": speed.zigzag * jitter, "phase": phase}
    raise ValueError(f"motion must be one of {', '.join(MOTIONS)} (got {motion!r}).")


def sample_background(rng: random.Random, kind: str | None = None) -> Background:
    """Draw a background, of the given kind if there is one."""
    kind = kind or rng.choice(BACKGROUNDS)
    tone = rng.choice(list(TONES))
    first, second = TONES[tone]
    shift = rng.uniform(-0.02, 0.02)
    first, second = _lift(first, shift), _lift(second, shift)
    if kind == "flat":
        mix = rng.random()
        first = (_mix(first[0], second[0], mix), _mix(first[1], second[1], mix), _mix(first[2], second[2], mix))
        return Background(kind, tone, first, first)
    if rng.random() < 0.5:
        first, second = second, first
    if kind == "gradient":
        return Background(kind, tone, first, second, angle=rng.randrange(8) * math.pi / 4)
    if kind == "checker":
        return Background(kind, tone, first, second, period=rng.choice((1 / 4, 1 / 3)))
    velocity = rng.choice((-1.0, 1.0)) * rng.uniform(0.10, 0.22)
    angle = rng.randrange(4) * math.pi / 4
    return Background(kind, tone, first, second, angle=angle, period=rng.uniform(0.24, 0.32), velocity=velocity)


def _mix(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def _lift(colour: RGB, shift: float) -> RGB:
    return (colour[0] + shift, colour[1] + shift, colour[2] + shift)


def sample_scene(rng: random.Random, *, split: str = "train", objects: int | None = None) -> Scene:
    """Draw a scene.

    Args:
        rng: source of randomness; the same state gives the same scene.
        split: "train", "heldout" (every object's shape, colour and motion is a triple that training never shows) or
            "any".
        objects: 1 or 2; None for 2 objects in a quarter of the scenes.

    Raises:
        ValueError: if the split is unknown or ``objects`` is neither 1 nor 2.
    """
    if objects not in (None, 1, 2):
        raise ValueError(f"objects must be 1 or 2 (got {objects}); None draws the number.")
    count = objects or (2 if rng.random() < 0.25 else 1)
    members = (_sample_pair if count == 2 else _sample_single)(rng, triples(split))
    background = sample_background(rng)
    moving = all(member.motion != "static" for member in members)
    hidden = count == 1 and moving and rng.random() < 0.07
    return Scene(members, background, _sample_occluder(rng, background) if hidden else None)


def _sample_single(rng: random.Random, choices: tuple[Triple, ...]) -> tuple[SceneObject, ...]:
    return (sample_object(rng, *rng.choice(choices)),)


def _sample_pair(rng: random.Random, choices: tuple[Triple, ...]) -> tuple[SceneObject, ...]:
    first = rng.choice(choices)
    return arrange_pair(rng, first, rng.choice([c for c in choices if c[1] != first[1]]))


def arrange_pair(rng: random.Random, first: Triple, second: Triple) -> tuple[SceneObject, ...]:
    """Draw paths on which two given objects are apart most of the time.

    They are small or medium, because two large ones would hide each other most of the time.
    """
    from videosparse.synthetic.motion import overlap_shares

    def draw(triple: Triple) -> SceneObject:
        return sample_object(rng, *triple, size=rng.choice(("small", "medium")))

    pairs = [(draw(first), draw(second)) for _ in range(10)]
    shares = overlap_shares(pairs)
    apart = [i for i, share in enumerate(shares) if share <= 0.15]
    return pairs[apart[0] if apart else shares.index(min(shares))]


def arrange_scene(rng: random.Random, objects: Sequence[Triple], background: str) -> Scene:
    """Draw a scene of one or two given (shape, colour, motion) triples before a given kind of background.

    Raises:
        ValueError: if there are neither 1 nor 2 triples.
    """
    if len(objects) not in (1, 2):
        raise ValueError(f"a scene has 1 or 2 objects (got {len(objects)}).")
    members = (sample_object(rng, *objects[0]),) if len(objects) == 1 else arrange_pair(rng, *objects)
    return Scene(members, sample_background(rng, background))


def _sample_occluder(rng: random.Random, background: Background) -> Occluder:
    """A bar whose grey differs from both tones of the background."""
    level = {"dark": 0.56, "grey": 0.14, "light": 0.36}[background.tone]
    return Occluder(rng.uniform(0.35, 0.65), rng.uniform(0.24, 0.30), (level, level, level))
