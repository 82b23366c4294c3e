"""`videosparse presets`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from videosparse.cli.console import Debug, guard

if TYPE_CHECKING:
    from videosparse.generation.presets import Preset, Speed


_PLANNED = ("height", "width", "steps", "guidance", "ultravico", "context_frames", "context_overlap")
"""Keys that a plan goes by, under its own names."""


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
            typer.echo(f"{preset.name:<24}{preset.about}")
            typer.echo(f"{'':<24}{_settings(preset)}")
        typer.echo("Speeds, for any model, by a preset of those or not (--preset wan2.1-14b-720p --preset fast):")
        for speed in SPEEDS.values():
            typer.echo(f"{speed.name:<24}{speed.about}")
            typer.echo(f"{'':<24}{', '.join(f'{key} {value}' for key, value in speed.values.items())}")


def _as_values(speed: Speed | None) -> dict[str, object]:
    """A speed as values of a run file for the usual method."""
    assert speed is not None  # a name is one of a model or of a speed
    values = dict(speed.values)
    quant = values.pop("quant", None)
    return values if quant is None else {**values, "radial": {"quant": quant}}


def _settings(preset: Preset) -> str:
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
    parts = [
        source.name,
        f"{values.get('frames') or defaults.num_frames} frames of {height}x{width}",
        f"{run.steps} steps",
        f"shift {values.get('shift', 'of the model')}",
        f"{method} at density {run.video_density:.2f}, {first + last} dense steps, "
        f"{run.schedule.first_layers + run.schedule.last_layers} dense layers",
        *(f"{key} {values[key]}" for key in ("rope", "ultravico", "context_frames", "offload") if key in values),
    ]
    return ", ".join(parts)
