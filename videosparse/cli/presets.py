"""`videosparse presets`."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from videosparse.cli.console import Debug, guard

if TYPE_CHECKING:
    from videosparse.generation.presets import Preset, Speed


_PLANNED = ("height", "width", "steps", "guidance", "ultravico", "context_frames", "context_overlap")
"""Keys that a plan goes by, under its own names."""
_HELD = "\N{NO-BREAK SPACE}"


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this one as a run file.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """List what generate --preset takes, or show one as the run file that generate --config takes."""
    with guard(debug):
        from videosparse.generation.presets import PRESETS, SPEEDS, split_presets
        from videosparse.generation.runfile import preset_as_toml

        if name is not None:
            model, speed = split_presets([name])
            typer.echo(preset_as_toml(name, _as_values(speed) if model is None else model.values), nl=False)
            return
        typer.echo("Models, at the settings that suit them:")
        for preset in PRESETS.values():
            _tell(preset.name, preset.about, _settings(preset))
        typer.echo("Speeds, for any model (--preset wan2.1-14b-720p --preset fast):")
        for speed in SPEEDS.values():
            _tell(speed.name, speed.about, [f"{key} {value}" for key, value in speed.values.items()])


def _tell(name: str, about: str, settings: list[str]) -> None:
    """Print a preset in the width of the terminal; a setting is never cut in two."""
    whole = ", ".join(setting.replace(" ", _HELD) for setting in settings)
    width = max(60, shutil.get_terminal_size().columns)
    for text, label in ((about, name), (whole, "")):
        told = textwrap.fill(text, width, initial_indent=f"{label:<24}", subsequent_indent=" " * 24)
        typer.echo(told.replace(_HELD, " "))


def _count(number: int, what: str) -> list[str]:
    """A number of things; nothing of none."""
    return [f"{number} {what}{'' if number == 1 else 's'}"] if number else []


def _as_values(speed: Speed | None) -> dict[str, object]:
    """A speed as values of a run file for the usual method."""
    assert speed is not None  # a name is one of a model or of a speed
    values = dict(speed.values)
    quant = values.pop("quant", None)
    return values if quant is None else {**values, "radial": {"quant": quant}}


def _settings(preset: Preset) -> list[str]:
    """Model, size, frames, steps, shift, method with its options, schedule and memory options, defaults filled in."""
    from videosparse.generation.planning import plan_run
    from videosparse.generation.sources import find_spec

    values = dict(preset.values)
    source = find_spec(str(values["model"]))
    method = str(values.get("method", "radial"))
    sizes = {key: values.get(key) for key in _PLANNED}
    run = plan_run(source, num_frames=values.get("frames"), method=method, options=values.get(method), **sizes)  # type: ignore[arg-type]
    defaults = source.defaults
    height, width = (values.get(key) or getattr(defaults, key) for key in ("height", "width"))
    first, last = run.schedule.dense_steps(run.steps)
    return [
        source.name,
        f"{values.get('frames') or defaults.num_frames} frames of {height}x{width}",
        f"{run.steps} steps",
        f"shift {values.get('shift', 'of the model')}",
        f"{method} at density {run.video_density:.2f}",
        *_count(first + last, "dense step"),
        *_count(run.schedule.first_layers + run.schedule.last_layers, "dense layer"),
        *(f"{key} {values[key]}" for key in ("rope", "ultravico", "context_frames", "offload") if key in values),
    ]
