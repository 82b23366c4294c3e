"""Presets: published models at the settings that suit them, by name; `videosparse presets` lists them.

A preset is what a run file is, see `runfile`: values by key, and the options of a method in a table of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
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
                "Wan 2.1 14B, Radial as published",
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


def find_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        GenerationError: there is none.
    """
    if name not in PRESETS:
        raise GenerationError(f"Unknown preset {name!r}; videosparse presets lists them.{nearest(name, PRESETS)}")
    return PRESETS[name]
