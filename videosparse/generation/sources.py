"""Where a model is and what it can take, read from its small config files: nothing here loads weights."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from videosparse.cases import MODELS, ModelSpec
from videosparse.clock import shift_of
from videosparse.generation.errors import GenerationError, nearest, one_line
from videosparse.generation.families import PIPELINE_FAMILIES, PipelineFamily, Rotary, family_of_pipeline
from videosparse.generation.hub import fetch
from videosparse.layout import VideoGrid
from videosparse.models import find_family, model_variant

EMBEDDED = "tiny-wan"

TINY_STEPS = 20
"""Denoising steps of the embedded model when nobody says otherwise."""

HUB_IDS = {
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.2-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "hunyuan-video": "hunyuanvideo-community/HunyuanVideo",
    "mochi": "genmo/mochi-1-preview",
}

MOST_TOKENS = 2**21
"""Several times the longest videos that anyone has published; beyond, numbers of blocks grow out of hand."""

_VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ModelDefaults:
    """What a model is run with when the user does not say.

    Args:
        num_frames: pixel frames.
        height, width: pixels.
        steps: denoising steps.
        guidance: guidance scale.
        max_sequence_length: text tokens that the pipeline pads or cuts the prompt to.
        fps: frames a second.
        guidance_2: guidance scale of a second expert, None where there is none or it uses the same.
        trained_frames: pixel frames of the longest videos that it was trained on, None for `num_frames`.
    """

    num_frames: int
    height: int
    width: int
    steps: int
    guidance: float
    max_sequence_length: int
    fps: int
    guidance_2: float | None = None
    trained_frames: int | None = None

    @property
    def longest(self) -> int:
        """Pixel frames of the longest videos that it was trained on."""
        return self.num_frames if self.trained_frames is None else self.trained_frames


DEFAULTS = {
    EMBEDDED: ModelDefaults(33, 128, 128, TINY_STEPS, 4.0, 48, 16, trained_frames=81),
    "wan2.1-1.3b": ModelDefaults(81, 480, 832, 50, 5.0, 512, 16),
    "wan2.1-14b": ModelDefaults(81, 480, 832, 50, 5.0, 512, 16),
    "wan2.2-a14b": ModelDefaults(81, 720, 1280, 40, 4.0, 512, 16, guidance_2=3.0),
    "wan2.2-5b": ModelDefaults(121, 704, 1280, 50, 5.0, 512, 24),
    "hunyuan-video": ModelDefaults(129, 720, 1280, 50, 6.0, 256, 24),
    "mochi": ModelDefaults(163, 480, 848, 64, 4.5, 256, 30),
}


@dataclass(frozen=True)
class ModelSource:
    """A model that was found but not loaded.

    Args:
        name: how messages and files call it.
        location: folder or hub id for `from_pretrained`; None when only the numbers are known.
        pipeline_class: name of the Diffusers class in model_index.json, "" when only the numbers are known.
        spec: the shape of its self-attention.
        defaults: how it is run when the user does not say.
        longest_axis: the most tokens the rotary table has along any axis, None for no limit.
        config: the transformer's configuration; None when only the numbers are known.
        experts: transformers that share a run.
    """

    name: str
    location: str | None
    pipeline_class: str
    spec: ModelSpec
    defaults: ModelDefaults
    longest_axis: int | None = None
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    experts: int = 1

    @property
    def pipelines(self) -> PipelineFamily:
        """What generation knows of its family's pipelines."""
        return PIPELINE_FAMILIES[self.spec.family]

    @property
    def described(self) -> ModelSpec | Mapping[str, Any]:
        """What `Processor.resolve` is asked about: the configuration that a run reads, too, where there is one."""
        return self.spec if self.config is None else self.config

    def grid(self, num_frames: int, height: int, width: int) -> VideoGrid:
        """The token grid of a video that the pipeline can make; see `ModelSpec.grid`.

        Raises:
            GenerationError: a size that the model cannot take, with the nearest that it can.
        """
        try:
            grid = self.spec.grid(num_frames, height, width, self.pipelines.multiple)
        except ValueError as error:
            raise GenerationError(str(error)) from None
        if grid.tokens > MOST_TOKENS:
            raise GenerationError(
                f"A video of {num_frames} frames of {height}x{width} is {grid.tokens} tokens for {self.name}, and at "
                f"most {MOST_TOKENS} are possible; use fewer frames or a smaller size."
            )
        limit = self.longest_axis
        if limit is not None:
            time, space = self.spec.stride
            step = space * self.spec.patch
            for label, got, tokens, most in (
                ("num_frames", num_frames, grid.frames, (limit - 1) * time + 1),
                ("height", height, grid.height, limit * step),
                ("width", width, grid.width, limit * step),
            ):
                if tokens > limit:
                    raise GenerationError(f"{label} must be at most {most} for {self.name} (got {got}); use {most}.")
        return grid


def embedded_model_path() -> Path:
    """The folder of the embedded model: in a checkout, in an installed wheel, or below the current folder.

    Raises:
        GenerationError: it is in none of them; says where to get it.
    """
    looked = list(_embedded_candidates())
    for folder in looked:
        if (folder / "model_index.json").is_file():
            return folder
    raise GenerationError(
        f"The embedded model {EMBEDDED} was not found (looked in {', '.join(map(str, looked))}); clone the repository "
        "and run from its root, reinstall the videosparse wheel, or pass --model with a Diffusers folder."
    )


def _embedded_candidates() -> Iterator[Path]:
    beside = Path(__file__).resolve().parents[2]
    installed = Path("share", "videosparse", EMBEDDED)
    yield beside / "assets" / EMBEDDED
    yield from _installed_data()
    yield Path(sysconfig.get_path("data")) / installed
    yield beside / installed  # pip install --target
    yield Path.cwd() / "assets" / EMBEDDED


def _installed_data() -> Iterator[Path]:
    """Where the installer recorded the model's files: right for a venv, --user and --prefix."""
    try:
        files = importlib.metadata.files("videosparse") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.as_posix().endswith(f"share/videosparse/{EMBEDDED}/model_index.json"):
            yield Path(str(file.locate())).resolve().parent


def find_model(name: str | None = None) -> ModelSource:
    """Find a model and read its config files.

    Args:
        name: a Diffusers folder, a hub id ("org/name"), a name from `videosparse.cases.MODELS`, or None for the
            embedded model.

    Raises:
        GenerationError: no such folder or hub model, a folder that holds no Diffusers pipeline, or a pipeline class
            that is not supported.
    """
    location = _locate(name)
    index = _read_config(location, "model_index.json")
    pipeline_class = str(index.get("_class_name") or "folder without a pipeline class")
    family = family_of_pipeline(pipeline_class)
    if family is None:
        known = [*text_to_video(), *(other for each in PIPELINE_FAMILIES.values() for other in each.others)]
        raise GenerationError(
            f"{location} is a {pipeline_class}, which videosparse does not know; supported: {', '.join(known)}."
        )
    transformer = _read_config(location, "transformer/config.json")
    vae = _read_config(location, "vae/config.json")
    _check_tokenizers(location, index)
    experts = _experts(index)
    spec = _spec(location, family, transformer, vae, experts)
    table = family.rotary == Rotary.TABLE
    longest = _count(location, "transformer", transformer, "rope_max_seq_len", 1024) if table else None
    defaults = _defaults(spec)
    text = int(min(defaults.max_sequence_length, _tokenizer_length(location)))
    defaults = replace(defaults, max_sequence_length=text)
    return ModelSource(spec.name, location, pipeline_class, spec, defaults, longest, transformer, experts)


def find_spec(name: str | None = None) -> ModelSource:
    """As `find_model`, but a name from `MODELS` needs no files: only its numbers are known then."""
    if name is not None and name.lower() in MODELS:
        spec = MODELS[name.lower()]
        experts = 2 if spec.variant == "wan2.2-a14b" else 1
        return ModelSource(spec.name, None, "", spec, _defaults(spec), experts=experts)
    return find_model(name)


def text_to_video() -> list[str]:
    """Pipelines that make a video from a prompt alone."""
    return [family.pipeline for family in PIPELINE_FAMILIES.values()]


def check_text_to_video(source: ModelSource) -> None:
    """Raise GenerationError unless the pipeline makes a video from a prompt alone."""
    if source.pipeline_class not in text_to_video():
        needs = source.pipelines.others.get(source.pipeline_class, "more than a prompt")
        raise GenerationError(
            f"{source.name} is a {source.pipeline_class}, which needs {needs} besides the prompt; generate takes "
            f"{', '.join(text_to_video())}. Use videosparse.sparsify(pipe, ...) in Python for the others."
        )


def scheduler_shift(source: ModelSource) -> float:
    """The shift of the noise levels of a run with the model's own scheduler.

    Raises:
        GenerationError: the folder is incomplete, or its scheduler has no shift, or one that changes with the size.
    """
    config = _read_config(source.location or "", "scheduler/scheduler_config.json")
    shift = shift_of(config)
    if shift is None:
        raise GenerationError(
            f"The scheduler of {source.name} ({config.get('_class_name')}) has no fixed shift of its noise levels; say "
            "which one videos will be made with: attention.shift."
        )
    return shift


def _locate(name: str | None) -> str:
    """A folder, or a hub id."""
    if name is None:
        return str(embedded_model_path())
    if not name.strip():
        raise GenerationError("--model must not be empty; give a folder, a hub id, or leave it out.")
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user
        reason = getattr(error, "strerror", None) or one_line(error)
        raise GenerationError(f"Cannot look for the model {name[:40]!r}: {reason}; give a folder.") from None
    if is_folder:
        return str(path)
    if is_file:
        raise GenerationError(f"--model must be a folder (got the file {name}); give the one with model_index.json.")
    if name.rstrip("/") in (EMBEDDED, f"assets/{EMBEDDED}"):
        return str(embedded_model_path())
    if name.lower() in HUB_IDS:
        return HUB_IDS[name.lower()]
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return name
    known = [EMBEDDED, *HUB_IDS]
    raise GenerationError(f"No model folder at {name}, and no model of that name.{nearest(name, known)}")


def _read_config(location: str, file: str) -> dict[str, Any]:
    """One JSON file of a folder or hub model.

    Raises:
        GenerationError: it is missing, or no JSON object.
    """
    path = Path(location) / file if Path(location).is_dir() else _download(location, file)
    if not path.is_file():
        if file == "model_index.json" and (path.parent / "config.json").is_file():
            raise GenerationError(
                f"{location} is one part of a model, not a pipeline: give the folder above, the one with "
                "model_index.json."
            )
        hint = "is no Diffusers pipeline" if file == "model_index.json" else "is incomplete"
        raise GenerationError(f"{location} {hint}: it has no {file}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenerationError(f"Cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise GenerationError(f"Cannot read {path}: expected a JSON object (got {type(value).__name__}).")
    return value


def _check_tokenizers(location: str, index: Mapping[str, Any]) -> None:
    """Raise GenerationError for a local tokenizer without its files: it would load, and read nothing of a prompt."""
    for part in ("tokenizer", "tokenizer_2"):
        kind = index.get(part)
        if not Path(location).is_dir() or not isinstance(kind, list) or kind[-1:] in ([], [None]):
            continue
        _read_config(location, f"{part}/tokenizer_config.json")
        if not any((Path(location) / part / file).is_file() for file in _VOCABULARIES):
            raise GenerationError(f"{location} is incomplete: it has none of {part}/{', '.join(_VOCABULARIES)}.")


def _tokenizer_length(location: str) -> float:
    """The longest text that a local model's tokenizer was made for; inf where nobody says."""
    if not (Path(location) / "tokenizer" / "tokenizer_config.json").is_file():
        return math.inf
    length = _read_config(location, "tokenizer/tokenizer_config.json").get("model_max_length")
    return length if isinstance(length, int) and length > 0 else math.inf


def _download(repo: str, file: str) -> Path:
    try:
        return fetch(repo, file)
    except GenerationError as error:
        raise GenerationError(f"There is no folder {repo}, and {error}") from error


def _experts(index: Mapping[str, Any]) -> int:
    """2 for a pipeline of two noise-level experts, also where only one of them is in the folder."""
    second = index.get("transformer_2")
    loaded = isinstance(second, list) and len(second) > 0 and second[0] is not None
    return 2 if loaded or index.get("boundary_ratio") else 1


def _count(location: str, part: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number above 0 from a part's configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GenerationError(
            f"Cannot read {location}/{part}/config.json: {key} must be a whole number above 0 (got {value!r}); "
            "download the model again."
        )
    return value


def _stride(location: str, family: PipelineFamily, vae: Mapping[str, Any]) -> tuple[int, int]:
    def stride(known: str | int, usual: int) -> int:
        return known if isinstance(known, int) else _count(location, "vae", vae, known, usual)

    return stride(family.vae_strides[0], 4), stride(family.vae_strides[1], 8)


def _patch(location: str, transformer: Mapping[str, Any]) -> int:
    patch = transformer.get("patch_size", 2)
    last = patch[-1] if isinstance(patch, list) and patch else patch
    return _count(location, "transformer", {"patch_size": last}, "patch_size")


def _spec(
    location: str, family: PipelineFamily, transformer: Mapping[str, Any], vae: Mapping[str, Any], experts: int
) -> ModelSpec:
    def count(key: str) -> int:
        return _count(location, "transformer", transformer, key)

    heads, head_dim = count("num_attention_heads"), count("attention_head_dim")
    class_name = transformer.get("_class_name")
    found = find_family(str(class_name))
    if found is None or found.name != family.name:
        raise GenerationError(
            f"{location}/transformer is a {class_name}, which is not the transformer of a {family.name} pipeline; "
            "check that the folder's parts belong together."
        )
    spec = ModelSpec(
        name=Path(location).name or location,
        family=family.name,
        variant=model_variant(transformer, experts=experts),
        layers=sum(count(key) for key in family.layers),
        heads=heads,
        head_dim=head_dim,
        stride=_stride(location, family, vae),
        text=family.text,
        patch=_patch(location, transformer),
    )
    return _named(spec)


def _named(spec: ModelSpec) -> ModelSpec:
    """The published model that this is, else the same numbers under the folder's name."""
    for known in MODELS.values():
        # the embedded model keeps its name at any depth: its width and strides are unlike any other's
        layers = spec.layers if known.name == EMBEDDED else known.layers
        named = replace(spec, name=known.name, ffn=known.ffn, experts=known.experts)  # the variant says how many
        if named == replace(known, layers=layers):
            return named
    return spec


def _defaults(spec: ModelSpec) -> ModelDefaults:
    return DEFAULTS.get(spec.name) or DEFAULTS[PIPELINE_FAMILIES[spec.family].usual]
