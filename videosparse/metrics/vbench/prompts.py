"""Prompt suites: which prompts a benchmark has, which dimensions each is for, and how videos are named after them.

A suite is a JSON file in the form of VBench's `VBench_full_info.json`, which can be given as it is:

    [{"prompt_en": "a cat, Van Gogh style", "dimension": ["appearance_style"],
      "auxiliary_info": {"appearance_style": {"appearance_style": "Van Gogh style"}}}, ...]

The videos of a prompt are called `{prompt}-0.mp4`, `{prompt}-1.mp4` and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUMBERED = re.compile(r"(?P<prompt>.*)-(?P<index>\d+)", re.DOTALL)


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite.

    Args:
        prompt: its text.
        dimensions: that its videos are scored in.
        auxiliary: what a dimension needs to know about it.
    """

    prompt: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """The prompts of a benchmark by their text."""

    prompts: Mapping[str, SuitePrompt]

    def without_videos(self, stems: Iterable[str], dimensions: Iterable[str]) -> list[str]:
        """Prompts of these dimensions that have no video among files of these stems."""
        wanted, there = set(dimensions), {prompt_of(stem) for stem in stems}
        return [p.prompt for p in self.prompts.values() if wanted & set(p.dimensions) and p.prompt not in there]


def load_suite(path: Path) -> Suite:
    """Read a suite. A prompt that comes up several times, as in VBench's file, is for all the dimensions named.

    Raises:
        ValueError: the file cannot be read or is no suite; one line for people.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a prompt suite ({error}).") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} is no prompt suite: expected a list of prompts as in VBench_full_info.json.")
    prompts: dict[str, SuitePrompt] = {}
    for number, entry in enumerate(entries):
        found = _read_prompt(entry, f"{path}, entry {number}")
        if (known := prompts.get(found.prompt)) is not None:
            dimensions = tuple(dict.fromkeys(known.dimensions + found.dimensions))
            found = SuitePrompt(found.prompt, dimensions, {**known.auxiliary, **found.auxiliary})
        prompts[found.prompt] = found
    return Suite(prompts)


def _read_prompt(entry: Any, where: str) -> SuitePrompt:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object with prompt_en and dimension.")
    prompt, dimensions = entry.get("prompt_en"), entry.get("dimension")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: prompt_en must be a text (got {prompt!r}).")
    if not (isinstance(dimensions, list) and all(isinstance(name, str) for name in dimensions)):
        raise ValueError(f"{where}: dimension must be a list of names (got {dimensions!r}).")
    auxiliary = entry.get("auxiliary_info") or {}
    if not isinstance(auxiliary, Mapping):
        raise ValueError(f"{where}: auxiliary_info must be an object (got {auxiliary!r}).")
    return SuitePrompt(prompt, tuple(dimensions), auxiliary)


def video_name(prompt: str, index: int, ending: str = ".mp4") -> str:
    """The file name of the video with that number of a prompt.

    Raises:
        ValueError: the prompt holds a slash, or makes a longer name than file systems take.
    """
    name = f"{prompt}-{index}{ending}"
    if "/" in prompt or "\0" in prompt:
        raise ValueError(f"A prompt that names a file must hold no slash (got {prompt!r}).")
    if len(name.encode()) > 255:
        raise ValueError(f"The prompt is too long for a file name of 255 bytes: {prompt[:60]!r}...")
    return name


def prompt_of(stem: str) -> str:
    """The prompt that a file's name without ending tells: all before the last "-{number}"."""
    match = _NUMBERED.fullmatch(stem)
    return match["prompt"] if match else stem
