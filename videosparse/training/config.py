"""The configuration of a training run: sections of documented keys, read from TOML, checked before anything loads."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videosparse.generation.errors import GenerationError, nearest
from videosparse.models.rope import ROPES

METHODS = ("radial", "paro", "dense")
OPTIMIZERS = ("adamw", "adamw8bit")
PRECISIONS = ("auto", "fp32", "bf16")
DRAWS = ("auto", "logit-normal", "uniform")
TRACKERS = ("tensorboard", "wandb", "trackio")


class ConfigError(GenerationError):
    """A configuration that cannot be trained; the message says what, expected, got and what to do, in one line."""


def key(default: Any, doc: str) -> Any:
    """A documented key with its default."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    path: str = key("assets/tiny-wan", "base model: a Diffusers folder, a hub id, or a name such as wan2.1-14b")
    component: str = key("transformer", "transformer, or transformer_2 for the low-noise expert of Wan2.2-A14B")
    fp8: bool = key(False, "keep the frozen weights of the blocks in 8 bits (Diffusers' layerwise casting)")
    rope: str = key("none", "temporal rotary embedding beyond trained_frames: none (as it is), riflex, ntk or pi")
    trained_frames: int = key(0, "pixel frames up to which the rotary embedding stays as it is; 0: the model's length")


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    path: str = key("", "data set that lora/prepare_dataset.py wrote")
    synthetic: int = key(0, "where path is missing, write it first from this many clips of the synthetic world")
    height: int = key(0, "of the synthetic clips, in pixels")
    width: int = key(0, "likewise, of the synthetic clips")
    fps: float = key(0.0, "frames a second of the clips, as they were prepared; 0: the model's")
    holdout: int = key(4, "clips of every size that are kept for validation and never trained on")
    caption_dropout: float = key(0.1, "share of samples that see the empty caption, which guidance needs")


@dataclass(frozen=True)
class LoraConfig:
    """What is added to the model."""

    rank: int = key(32, "of every adapter")
    alpha: float = key(32.0, "the adapter's output is scaled by alpha / rank")
    target: str = key("", "regular expression of module names; empty: q, k, v, o of every video self-attention")
    norms: bool = key(False, "also train the norms of queries and keys (LongLoRA); they go to a file of their own")


@dataclass(frozen=True)
class AttentionConfig:
    """The attention in training, exactly that of generation."""

    method: str = key("radial", "radial, paro (with a plan), or dense")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"doc": "of the method, as for videosparse generate --set"}
    )
    first_steps: float = key(
        0.04, "share of a run's steps, from its start, that is dense: noise above that step's level"
    )
    shift: float = key(
        0.0, "of the noise schedule that videos will be made with, for first_steps; 0: that of the model's scheduler"
    )
    first_layers: int = key(2, "dense layers at the start of the depth")


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    frames: tuple[int, ...] = key((), "pixel frames; several are trained one after the other")
    shares: tuple[float, ...] = key((), "share of the steps of each of frames; empty: equal shares")
    steps: int = key(1000, "optimizer steps in all")
    batch_size: int = key(1, "clips a process sees at a time")
    accumulate: int = key(1, "batches added up before each optimizer step")
    optimizer: str = key("adamw", "adamw, or adamw8bit (bitsandbytes)")
    lr: float = key(1e-4, "highest learning rate")
    warmup: int = key(20, "steps until the rate is reached")
    final_lr: float = key(0.1, "share of the rate that is left at the end of the cosine")
    weight_decay: float = key(0.01, "of AdamW, on all adapters")
    clip: float = key(1.0, "largest norm of the gradient")
    ema: float = key(0.0, "decay of a moving average of the adapters, which is exported then; 0: none")
    draw: str = key("auto", "noise levels before the shift: logit-normal, uniform, or auto: what suits the model")
    shift: float = key(0.0, "of the noise levels; 0: what suits the model")
    noise_from: float = key(0.0, "lowest noise level that is trained")
    noise_to: float = key(1.0, "highest noise level that is trained")
    precision: str = key("auto", "of the forward: fp32, bf16, or auto: bf16 on a GPU")
    checkpointing: bool = key(True, "recompute blocks in the backward pass: slower, far less memory")
    sequence_parallel: int = key(1, "processes that share one clip (Ulysses)")
    seed: int = key(0, "of everything that is drawn")


@dataclass(frozen=True)
class ValidateConfig:
    """What is measured on the way."""

    every: int = key(100, "steps between losses on held-out clips; 0: only at the start and the end")
    quantiles: tuple[float, ...] = key((0.1, 0.3, 0.5, 0.7, 0.9), "of the noise levels at which they are measured")
    video_every: int = key(0, "steps between validation videos; 0: none")
    prompts: tuple[str, ...] = key((), "of the validation videos")
    frames: int = key(0, "of the validation videos; 0: the last of train.frames")
    height: int = key(0, "of the validation videos, in pixels; 0: the model's")
    width: int = key(0, "likewise, of the validation videos; 0: the model's")
    steps: int = key(20, "denoising steps of the validation videos")
    guidance: float = key(4.0, "guidance scale of the validation videos")


@dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    folder: str = key("", "for checkpoints, videos, logs and the LoRA")
    save_every: int = key(200, "steps between checkpoints")
    keep: int = key(2, "newest checkpoints that are kept")
    trackers: tuple[str, ...] = key((), "tensorboard, wandb, trackio: each where it is installed")
    log_every: int = key(10, "steps between lines of the log")


@dataclass(frozen=True)
class Config:
    """A whole run; see `describe` for every key."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the steps of each of `train.frames`; sums to 1."""
        given = self.train.shares or (1.0,) * len(self.train.frames)
        return tuple(share / sum(given) for share in given)

    def frames_at(self, step: int) -> int:
        """Pixel frames that step `step` (from 0) trains."""
        done = 0.0
        for frames, share in zip(self.train.frames, self.shares, strict=True):
            done += share
            if step < round(done * self.train.steps):
                return frames
        return self.train.frames[-1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values by section."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, assignments: Iterable[str] = ()) -> Config:
    """Read a TOML file and change it by texts such as "train.lr=1e-4".

    Raises:
        ConfigError: a missing or damaged file, an unknown key (with the nearest name), or a bad value.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}; give a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}.") from error
    for text in assignments:
        _assign(values, text)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> Config:
    """A configuration from plain values by section.

    Raises:
        ConfigError: see `load_config`.
    """
    known = {f.name: f for f in dataclasses.fields(Config)}
    sections = {}
    for name, given in values.items():
        if name not in known:
            raise ConfigError(f"Unknown section {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name} must be a section of keys (got {given!r}); write [{name}].")
        sections[name] = _section(name, typing.get_type_hints(Config)[name], given)
    return Config(**sections)


def describe() -> Iterator[tuple[str, Any, str]]:
    """(key, default, what it is) of every key."""
    hints = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        default = hints[section.name]()
        for entry in dataclasses.fields(default):
            yield f"{section.name}.{entry.name}", getattr(default, entry.name), entry.metadata["doc"]


def _assign(values: dict[str, Any], text: str) -> None:
    name, equals, value = (part.strip() for part in text.partition("="))
    section, dot, entry = name.partition(".")
    if not (equals and dot and entry and value):
        raise ConfigError(f"--set expects section.key=value, such as train.lr=1e-4 (got {text!r}).")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a word without quotes
    target = values.setdefault(section, {})
    *path, last = entry.split(".")  # attention.options.decay
    for part in path:
        target = target.setdefault(part, {})
    target[last] = parsed


def _section(name: str, kind: Any, given: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    for entry in given:
        if entry not in hints:
            close = _elsewhere(entry) or nearest(entry, hints)
            raise ConfigError(f"Section {name} has no key {entry!r}; it has {', '.join(hints)}.{close}")
    return kind(**{entry: _value(f"{name}.{entry}", hints[entry], value) for entry, value in given.items()})


def _elsewhere(entry: str) -> str:
    """A hint at a key of that name in another section."""
    homes = [full for full, _, _ in describe() if full.split(".")[1] == entry]
    return f" Did you mean {homes[0]!r}?" if homes else ""


def _value(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type of its key."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(name, inner, item) for item in items)
    if origin in (dict, types.UnionType) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, such as {{ decay = 1.0 }} (got {value!r}).")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        words = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[hint]} (got {value!r}).")
    return value


def _check(config: Config) -> None:
    """Raise ConfigError for a value that no model could be trained with."""
    train, data, lora, validate = config.train, config.data, config.lora, config.validate
    for name, value, choices in (
        ("attention.method", config.attention.method, METHODS),
        ("train.optimizer", train.optimizer, OPTIMIZERS),
        ("train.precision", train.precision, PRECISIONS),
        ("train.draw", train.draw, DRAWS),
        ("model.component", config.model.component, ("transformer", "transformer_2")),
        ("model.rope", config.model.rope, ROPES),
        *(("output.trackers", tracker, TRACKERS) for tracker in config.output.trackers),
    ):
        if value not in choices:
            close = nearest(value, choices)
            if name == "attention.method" and value == "adaspa":
                close = " It searches for its maps while a video is made, and training has no such run."
            raise ConfigError(f"{name} must be {' or '.join(choices)} (got {value!r}).{close}")
    for name, number, least in (
        ("lora.rank", lora.rank, 1), ("train.steps", train.steps, 1), ("train.batch_size", train.batch_size, 1),
        ("train.accumulate", train.accumulate, 1), ("train.sequence_parallel", train.sequence_parallel, 1),
        ("output.save_every", config.output.save_every, 1), ("output.keep", config.output.keep, 1),
        ("output.log_every", config.output.log_every, 1), ("data.holdout", data.holdout, 0),
        ("data.synthetic", data.synthetic, 0), ("validate.every", validate.every, 0),
        ("validate.video_every", validate.video_every, 0), ("attention.first_layers", config.attention.first_layers, 0),
        ("train.seed", train.seed, 0), ("train.warmup", train.warmup, 0),
        ("model.trained_frames", config.model.trained_frames, 0), ("train.shift", train.shift, 0),
        ("attention.shift", config.attention.shift, 0), ("data.fps", data.fps, 0),
    ):  # fmt: skip
        if number < least:
            raise ConfigError(f"{name} must be at least {least} (got {number}).")
    for name, share in (
        ("data.caption_dropout", data.caption_dropout), ("attention.first_steps", config.attention.first_steps),
        ("train.ema", train.ema), ("train.final_lr", train.final_lr), ("train.noise_from", train.noise_from),
        ("train.noise_to", train.noise_to), *(("validate.quantiles", q) for q in validate.quantiles),
    ):  # fmt: skip
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} must be 0 to 1 (got {share}).")
    for name, positive in (("train.lr", train.lr), ("train.clip", train.clip), ("lora.alpha", lora.alpha)):
        if not 0 < positive < float("inf"):
            raise ConfigError(f"{name} must be above 0 and finite (got {positive}).")
    if not train.frames:
        raise ConfigError("train.frames is missing: the lengths to train, such as frames = [81, 161].")
    if train.shares and (len(train.shares) != len(train.frames) or min(train.shares) <= 0):
        raise ConfigError(
            f"train.shares must have one number above 0 for each of train.frames (got {list(train.shares)} for "
            f"{list(train.frames)})."
        )
    if train.noise_from >= train.noise_to:
        raise ConfigError(
            f"train.noise_from must be below train.noise_to (got {train.noise_from} and {train.noise_to})."
        )
    if not data.path:
        raise ConfigError("data.path is missing: the data set that lora/prepare_dataset.py wrote.")
    if not config.output.folder:
        raise ConfigError("output.folder is missing: where checkpoints and the LoRA go.")
    if validate.video_every and not validate.prompts:
        raise ConfigError("validate.video_every needs validate.prompts: what the validation videos show.")
    if config.attention.method == "paro" and "plan" not in config.attention.options:
        raise ConfigError(
            "attention.method paro needs attention.options.plan, a file of videosparse calibrate: without one it "
            "searches while a video is made, and training has no such run."
        )
