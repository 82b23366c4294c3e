"""Where the values of a request come from: a preset, a run file (TOML), the command line, a line of a prompt file.

Later ones win over earlier ones. A run file has one value a line and a table for the options of a method:

```toml
preset = ["wan2.1-14b-720p", "fast"]
prompt = "a cat surfing"
frames = 161
seed = 7

[radial]
decay = 0.5
```
A prompt file has a prompt a line, which may end in values of its own: `a cat surfing --f 81 --w 832 --h 480 --seed 3`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videosparse.generation.errors import GenerationError, nearest, one_line
from videosparse.generation.methods import METHODS, parse_overrides
from videosparse.generation.presets import presets_over, split_presets
from videosparse.generation.request import GenerationRequest

KEYS: dict[str, tuple[str, type]] = {
    "prompt": ("prompt", str),
    "model": ("model", str),
    "method": ("method", str),
    "frames": ("num_frames", int),
    "height": ("height", int),
    "width": ("width", int),
    "steps": ("steps", int),
    "guidance": ("guidance", float),
    "shift": ("shift", float),
    "negative_prompt": ("negative_prompt", str),
    "seed": ("seed", int),
    "fps": ("fps", float),
    "dtype": ("dtype", str),
    "device": ("device", str),
    "offload": ("offload", str),
    "step_cache": ("step_cache", str),
    "magnitudes": ("magnitudes", str),
    "linears": ("linears", str),
    "compile": ("compile", bool),
    "rope": ("rope", str),
    "trained_frames": ("trained_frames", int),
    "ultravico": ("ultravico", float),
    "context_frames": ("context_frames", int),
    "context_overlap": ("context_overlap", int),
}
"""Keys of a run file: the field of `GenerationRequest`, and the type of its value."""

LISTS: dict[str, tuple[str, type]] = {"lora": ("loras", str), "lora_scale": ("lora_scales", float)}
"""Keys of one value or several, likewise."""

OUTSIDE = {"preset": str, "prompts": str, "output": str}
"""Further keys, which belong to no request. `preset` is one name or two: of a model, of a speed."""

OF_PRESETS = ("speed", "usual_ultravico")
"""Fields of a request that only presets set."""

LINE_OPTIONS = {"w": "width", "h": "height", "f": "frames", "s": "steps", "seed": "seed"}

_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_TAIL = re.compile(r"(?:^|\s)--(\S+)(?:[ \t]+([^\s-]\S*|-\d\S*))?\s*$")


@dataclass(frozen=True)
class RunFile:
    """What a run file says.

    Args:
        values: by key, as in `KEYS`, and tables of method options.
        preset: names, see `OUTSIDE`.
        prompts, output: see `OUTSIDE`; None where it says nothing.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    preset: tuple[str, ...] = ()
    prompts: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file: its number from 1, the prompt, and values of its own by key."""

    number: int
    prompt: str
    values: Mapping[str, object]


def read_run_file(path: str | Path) -> RunFile:
    """Read a TOML file.

    Raises:
        GenerationError: no such file, no TOML, an unknown key (with the nearest), or a value of another type.
    """
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise GenerationError(f"Cannot read {path}: {error.strerror or one_line(error)}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GenerationError(f"{path} is no TOML: {one_line(error)}.") from error
    found = {key.replace("-", "_"): value for key, value in found.items()}
    for key, value in found.items():
        _check_value(str(path), key, value)
    outside = {key: found.pop(key) for key in OUTSIDE if key in found}
    preset = outside.pop("preset", [])
    return RunFile(found, tuple(preset) if isinstance(preset, list) else (preset,), **outside)


def read_prompts(path: str | Path) -> list[PromptLine]:
    """Read a prompt file; empty lines and lines that begin with # are left out.

    Raises:
        GenerationError: no such file, no prompt in it, or a line that ends in something unknown, with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise GenerationError(
            f"Cannot read prompts from {path}: {reason}; give a text file in UTF-8, with a prompt a line."
        ) from None
    found = [
        _prompt_line(str(path), number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not found:
        raise GenerationError(f"{path} holds no prompt; write one a line.")
    return found


def merge(layers: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """Values of several layers, later ones over earlier ones.

    Options of each method are merged one by one, and no method gets those of another. What layers say of a method that
    a later layer decides against is dropped; in the layer that decides, or after it, it stays, for the request to
    refuse. The trained length is dropped where a later layer wants no stretched rotary embedding, and nothing else
    goes by it.
    """
    merged: dict[str, object] = {}
    meant: set[str] = set()  # methods with options since the method was decided
    for layer in layers:
        if "method" in layer:
            meant.clear()
        meant |= layer.keys() & METHODS.keys()
        if layer.get("rope") == "none" and not {"ultravico", "usual_ultravico"} & {**merged, **layer}.keys():
            merged.pop("trained_frames", None)
        for key, value in layer.items():
            before = merged.get(key)
            merged[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, Mapping) else value
    meant.add(str(merged.get("method", "radial")))
    return {key: value for key, value in merged.items() if key not in METHODS or key in meant}


def merged_sources(
    chosen: Mapping[str, object], presets: Iterable[str], config: str | Path | None
) -> tuple[dict[str, object], RunFile]:
    """(values of presets, run file and command line, merged; what the run file says).

    Args:
        chosen: on the command line.
        presets: named there; one of a kind takes the place of that of the run file.
        config: the run file, None for none.

    Raises:
        GenerationError: see `read_run_file` and `preset_values`.
    """
    file = RunFile() if config is None else read_run_file(config)
    return merge([preset_values(presets_over(presets, file.preset)), file.values, chosen]), file


def preset_values(names: Iterable[str]) -> dict[str, object]:
    """The values of presets, one of a model and one of a speed at most.

    A speed adds its method, where it has one, and `speed`, its name: what of the rest can run is known when the device
    is, see `resolve_stack`. UltraViCo is what a preset usually takes: `usual_ultravico` of a request.

    Raises:
        GenerationError: there is no such preset, or there are two of a kind.
    """
    model, speed = split_presets(names)
    layers: list[Mapping[str, object]] = []
    if model is not None:
        layers.append({"usual_ultravico" if key == "ultravico" else key: value for key, value in model.values.items()})
    if speed is not None:
        method = {"method": speed.values["method"]} if "method" in speed.values else {}
        layers.append({"speed": speed.name, **method})
    return merge(layers)


def request_from(values: Mapping[str, object]) -> GenerationRequest:
    """The request of merged values.

    Raises:
        GenerationError: there is no prompt.
    """
    if "prompt" not in values:
        raise GenerationError(
            "There is no prompt; give it as an argument, in a run file (prompt = ...), or a file of them (--prompts)."
        )
    fields = {KEYS[key][0]: value for key, value in values.items() if key in KEYS}
    fields |= {key: values[key] for key in OF_PRESETS if key in values}
    lists = {field: values[key] for key, (field, _) in LISTS.items() if key in values}
    fields |= {field: tuple(value) if isinstance(value, list) else (value,) for field, value in lists.items()}
    options = {key: value for key, value in values.items() if key in METHODS}
    return GenerationRequest(**fields, options=options)  # type: ignore[arg-type]  # types were checked on the way in


def preset_as_toml(name: str, values: Mapping[str, object]) -> str:
    """The text of a run file that takes a preset, and names its values in comments, one to a line.

    Values of the preset stand aside where they have to, such as for a device or a LoRA; those of a run file do not. So
    only what its user changes is written into it.
    """
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    options = {
        f"{method}.{option}": value
        for method, table in values.items()
        if isinstance(table, Mapping)
        for option, value in table.items()
    }
    lines = [
        "# To change a value of the preset, take the # off its line.",
        f'preset = "{name}"',
        *(f"# {key} = {_toml(value)}" for key, value in {**plain, **options}.items()),
    ]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_value(path: str, key: str, value: Any) -> None:
    if key in METHODS:
        _check_table(path, key, value)
        return
    known = {**{name: kind for name, (_, kind) in {**KEYS, **LISTS}.items()}, **OUTSIDE}
    if key not in known:
        raise GenerationError(f"{path} has an unknown key {key!r}.{nearest(key, [*known, *METHODS])}")
    kind = (int, float) if known[key] is float else known[key]
    parts = value if key in (*LISTS, "preset") and isinstance(value, list) else [value]
    if not all(isinstance(part, kind) and isinstance(part, bool) == (kind is bool) for part in parts):
        raise GenerationError(f"{path}: {key} must be {_TYPES[known[key]]} (got {value!r}).")


def _check_table(path: str, method: str, table: Any) -> None:
    """Raise GenerationError unless a table names options of its method, whose values are as --set takes them."""
    if not isinstance(table, dict):
        raise GenerationError(f"{path}: {method} must be a table of options, [{method}] (got {table!r}).")
    for option, value in table.items():
        text = ",".join(str(part) for part in value) if isinstance(value, list) else str(value)
        parsed = parse_overrides([f"{method}.{option}={text}"])
        table[option] = parsed[method][option]


def _prompt_line(path: str, number: int, text: str) -> PromptLine:
    """A line without the options at its end: the last one is taken off until there is none."""
    values: dict[str, object] = {}
    while found := _TAIL.search(text):
        name, value = found.groups()
        if name not in LINE_OPTIONS:
            options = ", ".join(f"--{option}" for option in LINE_OPTIONS)
            raise GenerationError(f"{path}, line {number}: unknown --{name}; a line may end in {options}.")
        if value is None or not re.fullmatch(r"\d{1,19}", value):
            raise GenerationError(
                f"{path}, line {number}: --{name} must be followed by a whole number, such as --{name} 64 "
                f"(got {value or 'nothing'})."
            )
        if LINE_OPTIONS[name] in values:
            raise GenerationError(f"{path}, line {number}: --{name} is there twice; leave one.")
        values[LINE_OPTIONS[name]] = int(value)
        text = text[: found.start()].rstrip()
    if not text:
        raise GenerationError(f"{path}, line {number}: there is no prompt before the options.")
    return PromptLine(number, text, values)
