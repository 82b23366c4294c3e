"""LoRAs at generation: what a file says it is for, what follows for a request, and loading it.

A LoRA that videosparse trained says in the header of its safetensors file which model, method, schedule and lengths it
was trained for. Any other that Diffusers can load, such as one for a style, works beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from videosparse.generation.errors import GenerationError, one_line
from videosparse.generation.families import PIPELINE_FAMILIES
from videosparse.generation.hub import fetch, fetch_only
from videosparse.generation.sources import ModelSource

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
NORMS_FILE = "qk_norms.safetensors"
ABOUT_KEY = "videosparse"
FORMAT = "videosparse-lora-1"

COMPONENTS = "transformer", "transformer_2"
"""Of a pipeline: the only transformer, or the expert for high noise; and the one for low noise."""

_ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w./-]+\.safetensors))?")

T = TypeVar("T")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that was found but not loaded.

    Args:
        path: of its weights.
        scale: how much of it is added.
        about: what videosparse wrote when it was trained; empty for other LoRAs.
        norms: trained norms of queries and keys beside it, None where there are none.
        component: which transformer of the pipeline it belongs to.
        called: what it is called where its path does not tell, as one from the hub.
    """

    path: Path
    scale: float = 1.0
    about: Mapping[str, Any] = field(default_factory=dict)
    norms: Path | None = None
    component: str = COMPONENTS[0]
    called: str = ""

    @property
    def name(self) -> str:
        """For messages and as the adapter's name: the file's, or that of the folder of a file with the usual name."""
        stem = self.called or (self.path.parent.name if self.path.name == WEIGHTS_FILE else self.path.stem)
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem) or "lora"

    @property
    def frames(self) -> int | None:
        """The longest video it was trained for, None where it does not say."""
        return max(self.about["frames"]) if self.about else None

    @property
    def shift(self) -> float | None:
        """Of the noise schedule that it was trained for, None where it does not say."""
        return self.about.get("shift")

    def options(self, method: str, shift: float | None = None) -> dict[str, Any]:
        """The options of a method that it was trained with, its schedule included; empty for another method.

        Args:
            method: of the run.
            shift: of the run, None for the LoRA's own. With another one, more or fewer steps lie at the noise levels at
                which training was dense, and as many are dense (but for Mochi, whose steps are spaced otherwise).
        """
        if self.about.get("method") != method or method == "dense":
            return {}
        first = self.about["first_steps"]
        family = PIPELINE_FAMILIES.get(self.about["family"])
        by_shift = family is None or not family.halves
        if shift is not None and self.shift is not None and 0 < first < 1 and by_shift:
            # level / (1 - level) of a noise level is the shift times that of the share of the steps that is left
            first = round(first / (first + (1 - first) * self.shift / shift), 6)
        return {**self.about.get("options", {}), "first_steps": first, "first_layers": self.about["first_layers"]}

    def other_attention(self, method: str, options: Mapping[str, object]) -> str | None:
        """What is another attention in a run than in training, in a sentence; None where nothing is.

        Dense steps and layers are left out: more of them do no harm, and two experts share the larger numbers.
        """
        trained = self.about.get("method", method)
        if trained != method:
            return f"The LoRA {self.name} was trained with {trained} attention; this run has {method}."
        differing = [
            f"{option}={value}, here {options[option]}"
            for option, value in self.about.get("options", {}).items()
            if option in options and _plain(options[option]) != _plain(value)
        ]
        return f"The LoRA {self.name} was trained with {'; '.join(differing)}." if differing else None


@dataclass(frozen=True)
class Training:
    """What the LoRAs of a run were trained for, all together; None, "none" or empty where they do not say.

    Args:
        frames: pixel frames of the longest videos.
        shift: of the noise schedule.
        options: of the method of the run, its dense steps and layers included.
        rope: how the rotary embedding was stretched.
        rope_frames: pixel frames up to which it was left alone.
    """

    frames: int | None = None
    shift: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rope: str = "none"
    rope_frames: int | None = None


def trained_for(loras: Iterable[LoraFile], method: str, shift: float | None = None) -> Training:
    """What LoRAs were trained for; two experts of one run share the larger number of dense steps and layers.

    Args:
        loras: of the run.
        method: of the run.
        shift: of the run; None takes that of the LoRAs. See `LoraFile.options`.

    Raises:
        GenerationError: no shift was given, and they were trained for several.
    """
    loras = tuple(loras)
    options: dict[str, Any] = {}
    for lora in loras:
        found = lora.options(method, shift)
        for name in ("first_steps", "first_layers"):
            if name in found and name in options:
                found[name] = max(found[name], options[name])
        options |= found
    shifts = {lora.shift for lora in loras if lora.shift is not None}
    if shift is None and len(shifts) > 1:
        raise GenerationError(
            f"The LoRAs were trained for noise schedules of several shifts ({sorted(shifts)}); choose one with --shift."
        )
    rope = next((lora.about for lora in loras if lora.about.get("rope", "none") != "none"), None)
    return Training(
        frames=max((lora.frames for lora in loras if lora.frames is not None), default=None),
        shift=next(iter(shifts), None) if shift is None else shift,
        options=options,
        rope="none" if rope is None else str(rope["rope"]),
        rope_frames=None if rope is None else rope["trained_frames"],
    )


def first_given(*values: T | None) -> T:
    """The first value that is not None, such as: what was asked for, what a LoRA was trained for, the usual.

    Raises:
        ValueError: all are.
    """
    for value in values:
        if value is not None:
            return value
    raise ValueError("At least one value must not be None.")


def lora_notices(
    loras: Iterable[LoraFile], method: str, options: Mapping[str, object], frames: int, *, windows: bool = False
) -> list[str]:
    """Which LoRAs were trained with another attention than that of a run, or for shorter videos, a sentence each.

    Args:
        loras: of the run.
        method, options: of the run.
        frames: pixel frames that the transformer sees at once.
        windows: whether these are windows of a longer video.
    """
    found = []
    for lora in loras:
        if other := lora.other_attention(method, options):
            found.append(other)
        if lora.frames is not None and frames > lora.frames:
            here = f"windows have {frames}" if windows else f"this video has {frames}"
            found.append(f"The LoRA {lora.name} was trained for {lora.frames} frames; {here}.")
    return found


def find_loras(source: ModelSource, *texts: str | None) -> tuple[LoraFile, ...]:
    """What a program calls --lora, then --lora-2, found to fit a model; None is none.

    Raises:
        GenerationError: see `find_lora` and `check_fits`.
    """
    found = []
    for text, component in zip(texts, COMPONENTS, strict=False):
        if text is not None:
            lora = find_lora(text, component=component)
            check_fits(lora, source)
            found.append(lora)
    return tuple(found)


def find_lora(text: str, scale: float = 1.0, component: str | None = None) -> LoraFile:
    """Read what a LoRA file says.

    Args:
        text: the file, the folder of a `pytorch_lora_weights.safetensors`, or on the hub "org/name", or
            "org/name/file.safetensors" where there are several.
        scale: how much of it is added.
        component: that it has to belong to; None takes what the file says.

    Raises:
        GenerationError: no such file, a damaged one, a format of a newer version, or one for another expert.
    """
    path, repo, file = _weights(text)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        about = json.loads(header.get(ABOUT_KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise GenerationError(f"Cannot read the LoRA {path}: {one_line(error)}; copy it again.") from error
    if about and about.get("format") != FORMAT:
        raise GenerationError(
            f"{path} is of format {about.get('format')!r}, expected {FORMAT!r}; update videosparse, or train it again."
        )
    norms = path.parent / NORMS_FILE
    if about.get("norms") and repo:
        norms = fetch(repo, (Path(file).parent / NORMS_FILE).as_posix())
    found = norms if about.get("norms") and norms.is_file() else None
    if about.get("norms") and found is None:
        raise GenerationError(f"{path} was trained with norms, and {NORMS_FILE} is not beside it; copy it there.")
    if found is not None and scale != 1:
        raise GenerationError(f"{path} has trained norms, which cannot be scaled (got a scale of {scale}); use 1.")
    trained = about.get("component", component or COMPONENTS[0])
    if component not in (None, trained):
        option = "--lora" if trained == COMPONENTS[0] else "--lora-2"
        raise GenerationError(
            f"The LoRA {path} was trained for the {trained} (got the {component}); give it as {option}."
        )
    called = repo.partition("/")[2] if path.name == WEIGHTS_FILE else ""
    return LoraFile(path, scale, about, found, trained, called)


def _weights(text: str) -> tuple[Path, str, str]:
    """The file of a LoRA, fetched where it is on the hub; its repository and its name there, empty where it is not.

    Raises:
        GenerationError: there is none.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if path.is_file():
        return path, "", ""
    advice = f"give a .safetensors file, or a folder with {WEIGHTS_FILE}"
    on_hub = _ON_HUB.fullmatch(text)
    # a path that was mistyped is not looked for in the network
    if on_hub is None or Path(on_hub[1]).parent.is_dir() or on_hub[1].endswith(".safetensors"):
        raise GenerationError(f"No LoRA at {text!r}; {advice}, or a hub id.")
    try:
        if on_hub[2] is None:
            path, file = fetch_only(on_hub[1], WEIGHTS_FILE, but=NORMS_FILE)
        else:
            path, file = fetch(on_hub[1], on_hub[2]), on_hub[2]
        return path, on_hub[1], file
    except GenerationError as error:
        raise GenerationError(f"No LoRA at {text!r}, and {error}") from error


def check_fits(lora: LoraFile, source: ModelSource) -> None:
    """Raise GenerationError where a LoRA that says its model is for another."""
    if not lora.about:
        return
    wanted = {name: lora.about.get(name) for name in ("family", "layers", "heads")}
    here = {"family": source.spec.family, "layers": source.spec.layers, "heads": source.spec.heads}
    if wanted != here:
        raise GenerationError(
            f"The LoRA {lora.path} is for {lora.about.get('base_model')} ({_sizes(wanted)}), and {source.name} is "
            f"{_sizes(here)}; choose the --model that it was trained on."
        )
    if lora.component == "transformer_2" and source.experts < 2:
        raise GenerationError(f"The LoRA {lora.path} is for a second expert, and {source.name} has one transformer.")


def load_loras(pipe: Any, loras: tuple[LoraFile, ...]) -> None:
    """Load LoRAs into a pipeline, each with its scale; several on one transformer add up.

    Raises:
        GenerationError: Diffusers refuses one, or none of its keys is known.
    """
    names: dict[str, list[tuple[str, float]]] = {}
    for number, lora in enumerate(loras):
        name = _adapter(number, lora)
        extra = {"load_into_transformer_2": True} if lora.component == "transformer_2" else {}
        try:
            pipe.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, adapter_name=name, **extra)
        except Exception as error:  # peft, Diffusers and safetensors each raise their own
            raise GenerationError(f"Cannot load the LoRA {lora.path}: {one_line(error)}") from error
        transformer = getattr(pipe, lora.component)
        if not _has(transformer, name):
            raise GenerationError(f"The LoRA {lora.path} has nothing for the {lora.component} of this model.")
        names.setdefault(lora.component, []).append((name, lora.scale))
        if lora.norms is not None:
            load_norms(transformer, lora.norms)
    for component, adapters in names.items():
        getattr(pipe, component).set_adapters([name for name, _ in adapters], [scale for _, scale in adapters])


def check_loaded(pipe: Any, loras: tuple[LoraFile, ...]) -> None:
    """Raise GenerationError where a pipeline has not loaded the LoRAs of a request, as one that was given may not."""
    for number, lora in enumerate(loras):
        if not _has(getattr(pipe, lora.component, None), _adapter(number, lora)):
            raise GenerationError(
                f"The pipeline that was given has not loaded the LoRA {lora.path}; give none, or that of "
                "load_pipeline for this request."
            )


def load_norms(transformer: Any, path: Path) -> None:
    """Put trained norms of queries and keys into a transformer.

    Raises:
        GenerationError: the file is damaged, or of another model.
    """
    import torch
    from safetensors.torch import load_file

    try:
        norms = load_file(path)
    except (OSError, SafetensorError) as error:
        raise GenerationError(f"Cannot read {path}: {one_line(error)}.") from error
    mine = dict(transformer.named_parameters())
    with torch.no_grad():
        for name, value in norms.items():
            if name not in mine or mine[name].shape != value.shape:
                raise GenerationError(f"{path} is for another model: it has {name} {list(value.shape)}.")
            mine[name].copy_(value)


def _plain(value: object) -> object:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _adapter(number: int, lora: LoraFile) -> str:
    return f"{number}-{lora.name}"


def _has(transformer: Any, adapter: str) -> bool:
    return adapter in (getattr(transformer, "peft_config", None) or {})


def _sizes(values: Mapping[str, Any]) -> str:
    return f"{values['family']}, {values['layers']} layers, {values['heads']} heads"
