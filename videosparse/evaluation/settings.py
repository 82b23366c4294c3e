"""What is compared: a `Setting` is a method with a density, a precision and options, and makes a processor.

A setting is written `method[@density][+quant][:option=value]...`, for example `adaspa@0.2`, `paro@radial+int8-fp8`,
`adaspa@0.1:head_adaptive=no:block=128x64`. `radial` as a density is that of Radial Attention's default map on the same
grid. Methods: those of `videosparse generate`, and
    ceiling        the rendered truth of the prompt through the model's VAE: no model that uses this VAE does better
    other-noise    dense again, another seed: how far videos are apart that have only the prompt in common
    paro-online    PAROAttention without a plan; `paro` goes by one
    paro-mass      by a plan whose orders are those in which its maps keep most of the attention, not by the metric
    paro-raster    by a plan that reorders nothing: what token orders are worth
    random         equally many random blocks in every row: what a density is worth without looking
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from videosparse.cases import ModelSpec
from videosparse.evaluation.random_blocks import RandomProcessor
from videosparse.generation.environment import DTYPES
from videosparse.generation.errors import GenerationError, nearest
from videosparse.generation.methods import make_processor, parse_overrides
from videosparse.kernels import int8_path
from videosparse.kernels.options import QUANTS
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.radial import RadialPolicy
from videosparse.processors import DenseProcessor, Processor, RadialProcessor

ANCHORS = ("ceiling", "dense", "other-noise")
BY_PLAN = {"paro": "metric", "paro-mass": "mass", "paro-raster": "raster"}
"""Methods that go by a plan, and how its token orders are chosen: see `CalibrationRequest.order_by`, or not at all."""

BY_DENSITY = ("adaspa", *BY_PLAN, "paro-online", "random")
METHODS = (*ANCHORS, "radial", *BY_DENSITY)

OWN_DENSITY = "radial"
"""The density that Radial Attention has."""

OTHER_NOISE = 1000
"""Added to the seeds of `other-noise`."""

_WRITTEN = re.compile(r"([\w-]+)(?:@([\w.]+))?(?:\+([\w-]+))?((?::[^:]+)*)")


@dataclass(frozen=True)
class Setting:
    """A method with everything that distinguishes it from others of one comparison.

    Args:
        method: one of `METHODS`.
        density: asked, 0..1; "radial" for that of Radial Attention; None for methods that are asked for none.
        quant: integer attention, see `KernelOptions`.
        options: of the method, as written, "name=value".
    """

    method: str
    density: float | str | None = None
    quant: str | None = None
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As rows and pages call it: "adaspa 0.2, int8"."""
        method, _, kind = self.method.partition("-")
        name = {"noise": "other noise", "online": self.method}.get(kind, method)
        if self.density is not None:
            name += ", density of radial" if self.density == OWN_DENSITY else f" {self.density}"
        orders = {"raster": ["raster order"], "mass": ["orders by mass"]}.get(kind, [])
        return ", ".join([name, *orders, *filter(None, [self.quant]), *self.options])

    def unavailable(self, device: torch.device, dtype: str, head_dim: int) -> str | None:
        """Why integer attention, where the setting asks for it, cannot run there; None where it can.

        Args:
            device: of the model.
            dtype: its precision, "fp32", "bf16" or "fp16".
            head_dim: its channels of a head.
        """
        quant = _given(self).get("quant", self.quant)
        if quant is None or (reason := int8_path.unavailable(quant, device, DTYPES[dtype], head_dim)) is None:
            return None
        helps = "" if DTYPES[dtype] in int8_path.DTYPES else " --dtype bf16 or"
        return f"{quant} cannot run on {device}: {reason}; use{helps} a setting without it."

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with its videos."""
        return self == Setting("dense")

    def made_together(self, places: list[int]) -> list[list[int]]:
        """What of a batch is made at once: all of it, but one by one where samples of a batch share what a run finds,
        as token orders; else a video would depend on those beside it, and on how many the free memory allows."""
        return [[place] for place in places] if self.method == "paro-online" else [places]

    @property
    def seed_shift(self) -> int:
        """What is added to the seeds of the noise."""
        return OTHER_NOISE if self.method == "other-noise" else 0


def parse_setting(text: str) -> Setting:
    """The setting that a text describes; see the module.

    Raises:
        GenerationError: it is none; says what is wrong.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise GenerationError(f"A setting is method[@density][+quant][:option=value]... (got {text!r}).")
    method, density, quant, options = found.groups()
    if method not in METHODS:
        raise GenerationError(f"Unknown method {method!r}; use {', '.join(METHODS)}.{nearest(method, METHODS)}")
    if density is not None and method not in BY_DENSITY:
        raise GenerationError(f"{method} takes no density (got {text!r}); only {', '.join(BY_DENSITY)} do.")
    if quant is not None and (method in ("ceiling", "other-noise") or quant not in QUANTS):
        raise GenerationError(f"quant is int8, int8-fp8 or int8-int8, of dense or a sparse method (got {text!r}).")
    setting = Setting(method, _density(density), quant, tuple(filter(None, options.split(":"))))
    _given(setting)
    return setting


def expand(methods: Iterable[str], densities: Iterable[str]) -> list[Setting]:
    """The settings of methods x densities, each once: those that name a density, or take none, count as they are.

    Dense comes first of all: the others are compared with it.

    Raises:
        GenerationError: a text that is no setting.
    """
    wanted = [_density(text) for text in densities]
    settings = [Setting("dense")]
    for text in methods:
        setting = parse_setting(text)
        open_ended = setting.method in BY_DENSITY and setting.density is None
        settings += [replace(setting, density=d) for d in wanted] if open_ended else [setting]
    return list(dict.fromkeys(settings))


def _density(text: str | None) -> float | str | None:
    if text is None or text == OWN_DENSITY:
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise GenerationError(f'A density is "{OWN_DENSITY}" or a number in 0..1, 0 excluded (got {text!r}).')
    return value


def _given(setting: Setting) -> dict[str, Any]:
    """The options of a setting as values; raises GenerationError for those that a method lacks."""
    if setting.options and setting.method in (*ANCHORS, "random"):
        raise GenerationError(f"{setting.method} has no options (got {':'.join(setting.options)}).")
    if setting.method in (*ANCHORS, "random"):
        return {}
    method = setting.method.partition("-")[0]
    return parse_overrides(f"{method}.{option}" for option in setting.options).get(method, {})


@dataclass(frozen=True)
class Conditions:
    """What all settings of a comparison share.

    Args:
        model: specification or configuration of the transformer.
        grid: of the videos.
        text: text tokens of a sequence.
        block: (query rows, key rows), unless a setting has its own.
        first_steps: dense denoising steps of every sparse method.
        plan: gives the file of PAROAttention's plan for a density and a way of choosing orders, a value of `BY_PLAN`.
        experts: transformers of the model; Radial Attention's defaults depend on it.
    """

    model: ModelSpec | Mapping[str, Any]
    grid: VideoGrid
    text: int
    block: tuple[int, int]
    first_steps: int | float
    plan: Callable[[float, str], Path]
    experts: int = 1

    @property
    def radial_density(self) -> float:
        """Density of Radial Attention's default map on this grid and block."""
        policy = RadialProcessor(block=self.block).resolve(self.model, experts=self.experts, grid=self.grid).policy
        assert isinstance(policy, RadialPolicy)
        layout = TokenLayout(self.grid, self.text).aligned(self.block)
        return policy.block_map(layout).video_density(layout)

    def density(self, setting: Setting) -> float | None:
        """The density that a setting asks for, as a number."""
        asked = setting.density
        return self.radial_density if isinstance(asked, str) else asked

    def processor(self, setting: Setting) -> Processor:
        """What makes the videos of a setting; not for the ceiling, which needs none.

        Raises:
            GenerationError: options that the method refuses, or a plan that cannot be made.
        """
        density = self.density(setting)
        if setting.method in ANCHORS:
            return DenseProcessor(quant=setting.quant)
        if setting.method == "random":
            assert density is not None
            return RandomProcessor(density, self.block, self.first_steps, setting.quant)
        options: dict[str, Any] = {"first_steps": self.first_steps, "first_layers": 0, "quant": setting.quant}
        options |= _given(setting)
        if setting.method in BY_PLAN and density is not None:
            if "plan" not in options:
                options["plan"] = str(self.plan(density, BY_PLAN[setting.method]))
        else:
            options.setdefault("block", self.block)
            options |= {} if density is None else {"density": density}
        return make_processor(setting.method.partition("-")[0], options)
