"""Presets by name, which `videosparse presets` lists: published models at the settings that suit them, and speeds.

A model's preset is what a run file is, see `runfile`: values by key, and the options of a method in a table of its own.
A speed says what is combined with attention (see `stack`), and goes with any model, by a preset or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from videosparse.generation.errors import GenerationError, nearest


@dataclass(frozen=True)
class Preset:
    """Values of a request by key of a run file.

    Args:
        name: how --preset calls it.
        about: what it is for, in a few words.
        values: see `runfile.KEYS`; options of a method as a mapping under its name.
    """

    name: str
    about: str
    values: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """A tested combination of accelerations.

    Args:
        name: how --preset calls it.
        about: what it is for, in a few words.
        values: by key of a run file; `quant` is an option of whatever method runs.
    """

    name: str
    about: str
    values: Mapping[str, object]


_WAN_480P = {"frames": 81, "height": 480, "width": 832, "steps": 50, "guidance": 5.0, "shift": 3.0}
_WAN_720P = {**_WAN_480P, "height": 720, "width": 1280, "shift": 5.0}
_HUNYUAN_720P = {"frames": 129, "height": 720, "width": 1280, "steps": 50, "guidance": 6.0, "shift": 7.0}
_LONG = {"rope": "riflex"}

# Sizes, steps and shifts are those that the models' authors recommend; decay and dense steps those published with
# Radial Attention. What is not said here is the default of the model or the method.
_PUBLISHED_14B = {"decay": 0.2, "first_steps": 12, "first_layers": 1}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset("tiny", "the embedded model, seconds on a CPU", {"model": "tiny-wan", "frames": 33, "steps": 20}),
            Preset(
                "tiny-long",
                "the embedded model at four times its length",
                {"model": "tiny-wan", "frames": 321, "steps": 20, "trained_frames": 81, **_LONG},
            ),
            Preset(
                "tiny-windows",
                "the same by windows of its own length",
                {"model": "tiny-wan", "frames": 321, "steps": 20, "context_frames": 81, "context_overlap": 16},
            ),
            Preset("wan2.1-1.3b-480p", "Wan 2.1 1.3B", {"model": "wan2.1-1.3b", **_WAN_480P}),
            Preset("wan2.1-14b-480p", "Wan 2.1 14B", {"model": "wan2.1-14b", **_WAN_480P}),
            Preset(
                "wan2.1-14b-720p",
                "Wan 2.1 14B, Radial at its defaults",
                {"model": "wan2.1-14b", **_WAN_720P, "radial": _PUBLISHED_14B},
            ),
            Preset(
                "wan2.1-14b-720p-adaspa",
                "the same with maps that are searched for",
                {"model": "wan2.1-14b", **_WAN_720P, "method": "adaspa"},
            ),
            Preset(
                "wan2.1-14b-720p-2x",
                "twice the length without a LoRA, by UltraViCo",
                {"model": "wan2.1-14b", **_WAN_720P, "frames": 161, "ultravico": 0.9},
            ),
            Preset(
                "wan2.1-14b-720p-4x",
                "four times the length; better with a LoRA for that length",
                {"model": "wan2.1-14b", **_WAN_720P, "frames": 321, **_LONG},
            ),
            Preset(
                "wan2.2-a14b-720p",
                "Wan 2.2 with its two experts",
                {
                    "model": "wan2.2-a14b", "frames": 81, "height": 720, "width": 1280, "steps": 40, "shift": 12.0,
                    "offload": "model",
                },
            ),
            Preset(
                "wan2.2-5b-720p",
                "Wan 2.2 TI2V-5B",
                {"model": "wan2.2-5b", "frames": 121, "height": 704, "width": 1280, "steps": 50, "shift": 5.0},
            ),
            Preset("hunyuan-video-720p", "HunyuanVideo", {"model": "hunyuan-video", **_HUNYUAN_720P}),
            Preset(
                "hunyuan-video-720p-2x",
                "twice the length",
                {"model": "hunyuan-video", **_HUNYUAN_720P, "frames": 253, **_LONG},
            ),
            Preset(
                "mochi-480p",
                "Mochi",
                {"model": "mochi", "frames": 163, "height": 480, "width": 848, "steps": 64, "guidance": 4.5},
            ),
        )
    }
)  # fmt: skip


SPEEDS: Mapping[str, Speed] = MappingProxyType(
    {
        speed.name: speed
        for speed in (
            Speed("exact", "dense attention; blocks of the model are compiled", {"method": "dense", "compile": True}),
            Speed("balanced", "sparse attention at the defaults of the method and model, compiled", {"compile": True}),
            Speed(
                "fast",
                "the same in integers, with linear layers in FP8, and steps that change little skipped",
                {"quant": "int8", "linears": "fp8", "step_cache": "first-block", "compile": True},
            ),
        )
    }
)


def find_speed(name: str) -> Speed:
    """The speed's preset called `name`.

    Raises:
        GenerationError: there is none.
    """
    if name not in SPEEDS:
        raise GenerationError(f"Unknown speed {name!r}; use {', '.join(SPEEDS)}.{nearest(name, SPEEDS)}")
    return SPEEDS[name]


def presets_over(given: Iterable[str], before: Iterable[str]) -> tuple[str, ...]:
    """Names of the presets that were given, and of those before that are of the other kind.

    Raises:
        GenerationError: an unknown name, or two of a kind at once.
    """
    pairs = zip(split_presets(given), split_presets(before), strict=True)
    chosen = (new if new is not None else old for new, old in pairs)
    return tuple(preset.name for preset in chosen if preset is not None)


def split_presets(names: Iterable[str]) -> tuple[Preset | None, Speed | None]:
    """The model's preset and the speed's preset of several names, one of each at most.

    Raises:
        GenerationError: an unknown name, or two of a kind.
    """
    models: list[Preset] = []
    speeds: list[Speed] = []
    for name in names:
        if name in SPEEDS:
            speeds.append(SPEEDS[name])
        elif name in PRESETS:
            models.append(PRESETS[name])
        else:
            hint = nearest(name, [*PRESETS, *SPEEDS])
            raise GenerationError(f"Unknown preset {name!r}; videosparse presets lists them.{hint}")
    for kind, found in (("model", models), ("speed", speeds)):
        if len(found) > 1:
            given = " and ".join(preset.name for preset in found)
            raise GenerationError(f"Presets {given} are both of a {kind}; leave one.")
    return models[0] if models else None, speeds[0] if speeds else None
