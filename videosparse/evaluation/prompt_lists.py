"""Making lists of prompts of the synthetic world: balanced, and the same from the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from videosparse.evaluation.prompts import Prompt, Triple
from videosparse.synthetic.captions import caption, parse_caption
from videosparse.synthetic.scene import BACKGROUNDS


def balanced(choices: Sequence[Triple], count: int, rng: random.Random) -> list[Triple]:
    """Choose triples so that every shape, colour and motion comes up equally often; repeats once all are used."""
    used: Counter[Any] = Counter()
    for _ in range(count):

        def load(triple: Triple) -> tuple[float, float]:
            shape, colour, motion = triple
            parts = used[shape] / 8 + used[colour] / 4 + used[motion] / 6.4
            return used[triple] * 100 + parts, rng.random()

        triple = min(choices, key=load)
        used.update([*triple, triple])
    return [t for t in choices for _ in range(used[t])]


def pairs_of(choices: Sequence[Triple], count: int, rng: random.Random) -> list[tuple[Triple, Triple]]:
    """Pairs of two colours, the first of which are balanced."""
    return [(t, rng.choice([o for o in choices if o[1] != t[1]])) for t in balanced(choices, count, rng)]


def write_prompt(objects: tuple[Triple, ...], background: str, seed: int) -> dict[str, Any]:
    """One entry, whose caption names motion and background."""
    prompt = Prompt("", seed, objects, background)
    rng = random.Random(seed + 1)
    text = caption(prompt.scene(), rng)
    while parse_caption(text).background is None:
        text = caption(prompt.scene(), rng)
    listed = [{"shape": shape, "colour": colour, "motion": motion} for shape, colour, motion in objects]
    return {"prompt": text, "seed": seed, "objects": listed, "background": background}


def make_list(groups: Iterable[tuple[Triple, ...]], first_seed: int, rng: random.Random) -> list[dict[str, Any]]:
    """Entries for the given objects, over backgrounds in turn."""
    shuffled = list(groups)
    rng.shuffle(shuffled)
    return [
        write_prompt(group, BACKGROUNDS[i % len(BACKGROUNDS)], first_seed + 10 * i) for i, group in enumerate(shuffled)
    ]
