"""Captions of scenes from a small grammar, and the way back from a caption to what it promises.

A caption names shape, colour and motion of every object in words that determine them; it names the background nearly
always, size and speed sometimes. ``parse_caption`` reads every caption that ``caption`` writes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from videosparse.synthetic.scene import Background, Scene, SceneObject

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "ball", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star", "star", "star", "five-pointed star"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "magenta"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium-sized", "medium"),
    "large": ("large", "big"),
}
SPEED_WORDS: dict[str, tuple[str, ...]] = {
    "slow": ("slowly",),
    "medium": ("at a steady pace", "steadily"),
    "fast": ("quickly", "fast", "rapidly"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "flat": ("plain {tone} background", "plain {tone} background", "flat {tone} background", "solid {tone} background"),
    "gradient": ("{tone} gradient background", "smooth {tone} gradient", "{tone} gradient"),
    "checker": (
        "{tone} checker background",
        "{tone} checkerboard background",
        "{tone} checkerboard",
        "{tone} checkered background",
    ),
    "stripes": (
        "{tone} striped background",
        "{tone} background with moving stripes",
        "moving {tone} striped background",
        "{tone} background of moving stripes",
    ),
}


@dataclass(frozen=True)
class MotionPhrase:
    """One way to say a motion: "it ...s", "they ...", "... ing"."""

    singular: str
    plural: str
    participle: str

    @classmethod
    def of(cls, verb: str, rest: str = "", *, third: str = "", participle: str = "") -> MotionPhrase:
        """Conjugate a regular verb; ``third`` and ``participle`` override what is irregular."""
        tail = f" {rest}" if rest else ""
        return cls((third or verb + "s") + tail, verb + tail, (participle or verb.removesuffix("e") + "ing") + tail)


MOTION_PHRASES: dict[str, tuple[MotionPhrase, ...]] = {
    "static": (
        MotionPhrase.of("stand", "still"),
        MotionPhrase.of("stay", "still"),
        MotionPhrase.of("rest"),
        MotionPhrase("does not move", "do not move", "standing still"),
        MotionPhrase("is motionless", "are motionless", "resting"),
    ),
    "linear": (
        MotionPhrase.of("move", "in a straight line"),
        MotionPhrase.of("glide", "across the frame"),
        MotionPhrase.of("glide", "across"),
        MotionPhrase.of("drift"),
        MotionPhrase.of("drift", "across the frame"),
        MotionPhrase.of("slide", "across"),
        MotionPhrase("flies across", "fly across", "flying across"),
        MotionPhrase.of("move", "across the frame"),
    ),
    "orbit": (
        MotionPhrase.of("orbit"),
        MotionPhrase.of("orbit", "around a point"),
        MotionPhrase.of("circle", "around"),
        MotionPhrase.of("move", "in a circle"),
        MotionPhrase("goes round in circles", "go round in circles", "going round in circles"),
    ),
    "gravity": (
        MotionPhrase.of("bounce"),
        MotionPhrase.of("bounce"),
        MotionPhrase.of("bounce", "up and down"),
        MotionPhrase.of("bounce", "on the floor"),
        MotionPhrase("falls and bounces", "fall and bounce", "falling and bouncing"),
        MotionPhrase("drops and bounces", "drop and bounce", "dropping and bouncing"),
    ),
    "zigzag": (
        MotionPhrase.of("zigzag", participle="zigzagging"),
        MotionPhrase.of("zigzag", participle="zigzagging"),
        MotionPhrase.of("zigzag", "across the frame", participle="zigzagging"),
        MotionPhrase.of("move", "in a zigzag"),
        MotionPhrase.of("zig-zag", participle="zig-zagging"),
    ),
}
MOTION_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "static": ("motionless", "resting", "static"),
    "linear": ("drifting", "gliding"),
    "orbit": ("orbiting", "circling"),
    "gravity": ("bouncing",),
    "zigzag": ("zigzagging",),
}
OCCLUDER_WORDS = ("behind a grey bar", "behind a pillar")


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence about a scene; the same state of ``rng`` gives the same sentence."""
    what = _pair(scene, rng) if len(scene.objects) > 1 else _single(scene, rng)
    where = _background(scene.background, rng)
    preposition = rng.choice(("on", "on", "on", "over", "against", "in front of"))
    order = rng.random()
    if not where:
        text = what
    elif order < 0.1:
        text = f"{preposition} {_with_article(where)}, {what.removeprefix('a video of ')}"
    elif order < 0.2:
        text = f"{what}, {where}"
    else:
        text = f"{what} {preposition} {_with_article(where)}"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.25 else text


def empty_or_caption(scene: Scene, rng: random.Random, drop: float = 0.1) -> str:
    """A caption, or with probability ``drop`` the empty text that guidance needs."""
    return "" if rng.random() < drop else caption(scene, rng)


def _noun(thing: SceneObject, rng: random.Random, adjective: str = "") -> str:
    """ "a small red circle"."""
    size = rng.choice(SIZE_WORDS[thing.size]) if rng.random() < (0.1 if thing.size == "medium" else 0.4) else ""
    words = [size, adjective, rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])]
    return _with_article(" ".join(word for word in words if word))


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _adverb(thing: SceneObject, rng: random.Random) -> str:
    """ " slowly", or nothing."""
    stated = thing.motion != "static" and rng.random() < (0.1 if thing.speed == "medium" else 0.4)
    return " " + rng.choice(SPEED_WORDS[thing.speed]) if stated else ""


def _single(scene: Scene, rng: random.Random) -> str:
    """What the only object does: "a red circle bounces quickly"."""
    thing = scene.objects[0]
    bar = " " + rng.choice(OCCLUDER_WORDS) if scene.occluder else ""
    form = rng.random()
    if form < 0.1:
        return _noun(thing, rng, rng.choice(MOTION_ADJECTIVES[thing.motion])) + bar
    phrase = rng.choice(MOTION_PHRASES[thing.motion])
    adverb = _adverb(thing, rng)
    if form < 0.35:
        lead = rng.choice(("", "", "", "there is ", "a video of "))
        return lead + _noun(thing, rng) + " " + phrase.participle + adverb + bar
    return _noun(thing, rng) + " " + phrase.singular + adverb + bar


def _pair(scene: Scene, rng: random.Random) -> str:
    """What two objects do, in either order: "a red circle bounces and a blue star rests"."""
    first, second = rng.sample(scene.objects, 2)
    if first.motion == second.motion and rng.random() < 0.5:
        phrase = rng.choice(MOTION_PHRASES[first.motion])
        return f"{_noun(first, rng)} and {_noun(second, rng)} {phrase.plural}"
    link = rng.choice((" and ", " and ", " while ", ", "))
    form = "participle" if rng.random() < 0.25 and link != " while " else "singular"
    parts = [
        f"{_noun(o, rng)} {getattr(rng.choice(MOTION_PHRASES[o.motion]), form)}{_adverb(o, rng)}"
        for o in (first, second)
    ]
    return link.join(parts)


def _background(background: Background, rng: random.Random) -> str:
    """ "dark checker background"; empty in a few captions."""
    if rng.random() < 0.05:
        return ""
    tone = background.tone if rng.random() < 0.35 else ""
    words = rng.choice(BACKGROUND_WORDS[background.kind]).format(tone=tone)
    return " ".join(words.split())


@dataclass(frozen=True)
class ExpectedObject:
    """What a caption says about one object; None where it is silent."""

    shape: str
    colour: str
    motion: str | None
    size: str | None = None
    speed: str | None = None


@dataclass(frozen=True)
class Expected:
    """What a caption says about a whole video; None where it is silent."""

    objects: tuple[ExpectedObject, ...]
    background: str | None = None
    occluder: bool = False

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.objects)


_MOTION_PATTERNS: dict[str, str] = {
    "zigzag": r"zig-?zag(?:s|ging)?",
    "orbit": r"orbit(?:s|ing)?|circl(?:es|e|ing) around|circling|in (?:a circle|circles)|round in circles",
    "gravity": r"bounc(?:es|e|ing)|(?:fall|drop)(?:s|ping|ing)?",
    "linear": r"straight line|glid(?:es|e|ing)|drift(?:s|ing)?|slid(?:es|e|ing)|fl(?:ies|y|ying) across|across",
    "static": r"still|rest(?:s|ing)?|motionless|(?:not|n't) move|static",
}
_MOTION = re.compile("|".join(rf"(?P<{name}>\b(?:{body})\b)" for name, body in _MOTION_PATTERNS.items()))
_BACKGROUND = re.compile(
    r"(?P<checker>check(?:er|ers|erboard|ered)\b)|(?P<stripes>\bstrip(?:es|ed)\b)"
    r"|(?P<gradient>\bgradient\b)|(?P<flat>\b(?:plain|flat|solid)\b)"
)


def _words_pattern(words: dict[str, tuple[str, ...]], suffix: str = "") -> str:
    return "|".join(sorted({re.escape(w) + suffix for group in words.values() for w in group}, key=len, reverse=True))


def _meaning(word: str | None, words: dict[str, tuple[str, ...]]) -> str | None:
    return next((name for name, group in words.items() if word in group), None)


_OBJECT = re.compile(
    rf"\b(?:(?P<size>{_words_pattern(SIZE_WORDS)}) )?(?:[\w-]+ing |motionless |static )?"
    rf"(?P<colour>{_words_pattern(COLOUR_WORDS)}) (?P<shape>{_words_pattern(SHAPE_WORDS)})\b"
)
_SPEED = re.compile(rf"\b(?:{_words_pattern(SPEED_WORDS)})\b")


def parse_caption(text: str) -> Expected:
    """What a caption promises.

    Args:
        text: a caption of ``caption``, or anything a person writes with the same words.

    Returns:
        The objects in the order in which the text names them, the background and whether there is an occluder.

    Raises:
        ValueError: if the text names no object as colour and shape, such as "red circle".
    """
    text = text.lower()
    nouns = list(_OBJECT.finditer(text))
    if not nouns:
        raise ValueError(
            f'the caption must name a colour and a shape, as in "a red circle bounces" (got {text!r}); '
            f"colours: {', '.join(COLOUR_WORDS)}; shapes: {', '.join(SHAPE_WORDS)}."
        )
    ends = [noun.start() for noun in nouns[1:]] + [len(text)]
    clauses = [text[noun.end() : end] for noun, end in zip(nouns, ends, strict=True)]
    background = _BACKGROUND.search(text)
    return Expected(
        objects=tuple(_expected_object(noun, clauses[i:]) for i, noun in enumerate(nouns)),
        background=background.lastgroup if background else None,
        occluder=re.search(r"behind a(?: grey)? (?:bar|pillar)", text) is not None,
    )


def named_motions(text: str) -> list[tuple[int, str]]:
    """Where each object's colour ends in a caption, counted in characters, and how that object moves; in their order.

    Objects whose motion the caption does not tell are left out; a text that names no object gives none.
    """
    ends = [noun.end("colour") for noun in _OBJECT.finditer(text.lower())]
    objects = parse_caption(text).objects if ends else ()
    return [(end, thing.motion) for end, thing in zip(ends, objects, strict=True) if thing.motion]


def _expected_object(noun: re.Match[str], clauses: list[str]) -> ExpectedObject:
    """Read one object: its motion stands before its colour ("a bouncing red ball") or follows, maybe shared."""
    motion = _MOTION.search(noun.group())
    own = clauses[0]
    for clause in clauses:
        motion = motion or _MOTION.search(clause)
    speed = _SPEED.search(own)
    shape = _meaning(noun["shape"], SHAPE_WORDS)
    colour = _meaning(noun["colour"], COLOUR_WORDS)
    return ExpectedObject(
        shape=shape or noun["shape"],
        colour=colour or noun["colour"],
        motion=motion.lastgroup if motion else None,
        size=_meaning(noun["size"], SIZE_WORDS),
        speed=_meaning(speed.group(), SPEED_WORDS) if speed else None,
    )
