"""Lists of prompts: of the synthetic world, whose detectors know what a prompt promises, or plain lines of text."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videosparse.synthetic.captions import Expected, parse_caption
from videosparse.synthetic.scene import Scene, arrange_scene

Triple = tuple[str, str, str]
"""Shape, colour and motion of an object."""


_NAMES = ("prompt", "seed", "objects", "background")
_PARTS = ("shape", "colour", "motion")
_SEE = "see eval/prompts/world64.json."


@dataclass(frozen=True)
class Prompt:
    """One entry of a prompt list.

    Args:
        prompt: its text.
        seed: of its noise, and of its scene.
        objects: what it promises; none for a prompt that is not of the synthetic world.
        background: of the scene; "" for such a prompt.
    """

    prompt: str
    seed: int
    objects: tuple[Triple, ...] = ()
    background: str = ""

    @property
    def of_world(self) -> bool:
        """Whether detectors can say what is right."""
        return bool(self.objects)

    def expected(self) -> Expected:
        """What to score: the text says it all."""
        return parse_caption(self.prompt)

    def scene(self) -> Scene:
        """A true scene of this prompt."""
        return arrange_scene(random.Random(self.seed), self.objects, self.background)


def load_prompts(path: Path) -> list[Prompt]:
    """Read a list: .json of the synthetic world, as `eval/score_world.py --make-prompts` writes it, or text.

    Of a text file every line is a prompt but empty ones and comments (#); the seed is the number of the line.

    Raises:
        ValueError: it cannot be read or holds none, or the text of an entry does not say what its attributes say.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = _of_world(path, text) if path.suffix == ".json" else _of_text(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(f"Cannot read prompts from {path} ({reason}); {_SEE}") from error
    if not found:
        raise ValueError(f"{path} holds no prompt; write one a line.")
    return found


def _of_text(text: str) -> list[Prompt]:
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [Prompt(line, number) for number, line in lines if line and not line.startswith("#")]


def _of_world(path: Path, text: str) -> list[Prompt]:
    prompts = []
    for entry in _entries(path, json.loads(text)):
        if not isinstance(entry["prompt"], str) or type(entry["seed"]) is not int:
            raise ValueError(f"{path}: a prompt must be text, its seed a whole number (got {entry}).")
        objects = tuple((o["shape"], o["colour"], o["motion"]) for o in entry["objects"])
        prompt = Prompt(entry["prompt"], entry["seed"], objects, entry["background"])
        told = {(o.shape, o.colour, o.motion) for o in prompt.expected().objects}
        if told != set(objects) or prompt.expected().background != prompt.background:
            raise ValueError(f"{path}: {entry['prompt']!r} does not say {entry}; run --make-prompts again.")
        prompts.append(prompt)
    return prompts


def _entries(path: Path, found: Any) -> list[dict[str, Any]]:
    """The entries of a list as JSON has it; raises ValueError where it is none, or one lacks something."""
    if not isinstance(found, dict) or not isinstance(found.get("prompts"), list):
        got = "no such list" if isinstance(found, dict) else f"a JSON {type(found).__name__}"
        raise ValueError(f'{path} must hold {{"prompts": [...]}} (got {got}); {_SEE}')
    for number, entry in enumerate(found["prompts"], start=1):
        _check_entry(f"{path}, prompt {number}", entry)
    return list(found["prompts"])


def _check_entry(place: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be an object with {', '.join(_NAMES)} (got {entry!r}); {_SEE}")
    if lacks := [name for name in _NAMES if name not in entry]:
        raise ValueError(f"{place} has no {lacks[0]!r}; {_SEE}")
    objects = entry["objects"]
    if not isinstance(objects, list) or not all(isinstance(o, dict) and o.keys() >= set(_PARTS) for o in objects):
        raise ValueError(f"{place}: objects must be a list, each with {', '.join(_PARTS)} (got {objects!r}); {_SEE}")
