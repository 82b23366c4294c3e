"""What a user asks for (`GenerationRequest`), and the same with gaps filled and values checked (`Settings`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, TypeVar

import torch

from videosparse.generation.environment import DTYPES, choose_device, choose_dtype
from videosparse.generation.errors import GenerationError, nearest
from videosparse.generation.families import Guidance, Rotary
from videosparse.generation.lengths import context, far_logits, seen, trained_length, usual_logits
from videosparse.generation.lora import LoraFile, check_fits, find_lora, trained_for
from videosparse.generation.methods import (
    Options,
    check_method,
    check_method_fits,
    check_options_used,
    make_processor,
)
from videosparse.generation.sources import ModelSource, check_text_to_video, find_model
from videosparse.generation.stack import Stack, resolve_stack
from videosparse.layout import VideoGrid
from videosparse.logits import FarLogits
from videosparse.models.rope import ROPES
from videosparse.windows import Windows

# schedulers interpolate between the 1000 noise levels of training
MOST_STEPS = 1000
GUIDANCES = 0, 100
SHIFTS = 0.01, 100
RATES = 1, 240

_SEED_LIMIT = 2**63

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class GenerationRequest:
    """A video to make. What is None is taken from the model's defaults.

    Args:
        prompt: what the video shows; longer than the model reads is cut by its pipeline.
        model: Diffusers folder, hub id or a name from `videosparse.cases.MODELS`; None is the embedded model.
        method: "radial", "adaspa", "paro" or "dense".
        options: of each method by name, such as {"radial": {"decay": 0.5}}.
        num_frames: pixel frames.
        height, width: pixels.
        steps: denoising steps.
        guidance: guidance scale; at most 1 turns classifier-free guidance off.
        negative_prompt: what the video should not show.
        seed: of the noise, 0 or more; the noise is drawn on the CPU, so it is the same on every device.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto", "fp32", "bf16" or "fp16".
        fps: frames a second of the file.
        offload: "model" keeps only the part in use on the GPU, "group" one block of the transformer and the next.
        step_cache: "first-block" or "magcache", with a threshold ("first-block=0.1") or Diffusers' default: skips all
            blocks but the first where a step changes little; "none" does not.
        magnitudes: for magcache, a file of what the model's steps change; one that is not there is measured.
        linears: "fp8" computes the linear layers of the blocks in FP8; "none" leaves them.
        compile: whether the blocks are compiled.
        speed: "exact", "balanced" or "fast": what of the four before to take where it is None; see `presets.SPEEDS`.
        loras: files or folders of LoRAs. One that videosparse trained sets the length and the options of its method,
            where they are not given.
        lora_scales: how much of each is added; those that are left out are 1.
        shift: of the noise schedule towards noise, None for the model's own.
        rope: "none", "riflex", "ntk" or "pi": how rotary embeddings stretch beyond the trained length.
        trained_frames: pixel frames of that length, which `ultravico` goes by, too.
        ultravico: factor of positive scores of far tokens in a video beyond the trained length, such as 0.9; see
            `FarLogits`. None leaves them.
        usual_ultravico: the same of a preset: it is left out, with a notice, where the video is no longer than what the
            model and its LoRAs were trained for. `ultravico` wins.
        context_frames: pixel frames of overlapping windows that the transformer is called on; None is the whole video.
        context_overlap: pixel frames that neighbouring windows share; None is 16 or the next the model can.
    """

    prompt: str
    model: str | None = None
    method: str = "radial"
    options: Mapping[str, Options] = field(default_factory=dict)
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    fps: float | None = None
    offload: str = "none"
    step_cache: str | None = None
    magnitudes: str | None = None
    linears: str | None = None
    compile: bool | None = None
    speed: str | None = None
    loras: tuple[str, ...] = ()
    lora_scales: tuple[float, ...] = ()
    shift: float | None = None
    rope: str = "none"
    trained_frames: int | None = None
    ultravico: float | None = None
    usual_ultravico: float | None = None
    context_frames: int | None = None
    context_overlap: int | None = None

    def resolve(self) -> Settings:
        """Fill the gaps and check everything that can be checked without loading weights.

        Raises:
            GenerationError: the first thing that is wrong.
        """
        self.check_words()
        source = find_model(self.model)
        check_text_to_video(source)
        if self.negative_prompt and source.pipelines.guidance == Guidance.EMBEDDED:
            raise GenerationError(
                f"{source.pipelines.title} is distilled to run without a second branch and ignores a negative prompt; "
                "drop it."
            )
        fitted = self.fitted(source)
        defaults, grid = source.defaults, fitted.grid
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        request, stack, left_out = resolve_stack(fitted.request, source, device, DTYPES[dtype])
        logit = request._logit(source, grid, fitted.loras)
        options = request.options.get(self.method)
        check_method_fits(source, grid, self.method, options, device, fitted.steps, DTYPES[dtype], logit)
        return Settings(
            request=request,
            source=source,
            grid=grid,
            num_frames=fitted.num_frames,
            height=fitted.height,
            width=fitted.width,
            steps=fitted.steps,
            guidance=within("guidance", self.guidance, defaults.guidance, GUIDANCES),
            guidance_2=defaults.guidance_2 if self.guidance is None else None,
            fps=within("fps", self.fps, defaults.fps, RATES),
            device=device,
            dtype=dtype,
            shift=request.shift,
            trained_frames=fitted.trained_frames,
            loras=fitted.loras,
            logit=logit,
            windows=fitted.windows,
            stack=stack,
            notices=(*left_out, *fitted.notices),
        )

    def _untrained(self, source: ModelSource, grid: VideoGrid, loras: tuple[LoraFile, ...]) -> Iterator[str]:
        """Whether the model sees more at once than it was trained on, with nothing that helps."""
        frames, longest = (grid.frames - 1) * source.spec.stride[0] + 1, source.defaults.longest
        if frames <= longest or self.rope != "none" or self.ultravico is not None:
            return
        if any(lora.frames is not None for lora in loras):  # of shorter ones `lora_notices` tells
            return
        rope = "" if source.pipelines.rotary == Rotary.LEARNED else "--rope riflex, "
        yield (
            f"{frames} frames at once are beyond the {longest} that {source.name} was trained on: the video may repeat "
            f"or fall apart; see --ultravico 0.9, {rope}--context-frames {longest}, or a --lora for that length."
        )

    def fitted(self, source: ModelSource) -> Fitted:
        """This request with what a model and LoRAs bring, wherever it runs.

        Raises:
            GenerationError: sizes, steps, a shift, a rotary embedding or LoRAs that the model cannot have.
        """
        if self.shift is not None:
            within("shift", self.shift, self.shift, SHIFTS)
        loras = self.found_loras(source)
        request = self.extended(loras)
        defaults = source.defaults
        sizes = {
            name: getattr(defaults, name) if getattr(request, name) is None else getattr(request, name)
            for name in ("num_frames", "height", "width")
        }
        windows = context(source, self.context_frames, self.context_overlap)
        grid = seen(source.grid(**sizes), windows)
        request, aside = request.with_usual_logits(source, grid, loras)
        steps = within("steps", self.steps, defaults.steps, (source.pipelines.least_steps, MOST_STEPS))
        return Fitted(
            request, loras, **sizes, steps=steps, grid=grid, windows=windows,
            trained_frames=request._trained_frames(source),
            notices=(*aside, *request._untrained(source, grid, loras)),
        )  # fmt: skip

    def found_loras(self, source: ModelSource) -> tuple[LoraFile, ...]:
        """The LoRAs that were asked for, found to fit.

        Raises:
            GenerationError: see `find_lora` and `check_fits`; or scales that are no numbers, or too many.
        """
        if len(self.lora_scales) > len(self.loras):
            raise GenerationError(
                f"--lora-scale is given {len(self.lora_scales)} times and --lora {len(self.loras)} times; give one "
                "--lora for each --lora-scale."
            )
        for scale in self.lora_scales:
            if not math.isfinite(scale):
                raise GenerationError(f"lora_scale must be a finite number (got {scale}); use 1.")
        scales = (*self.lora_scales, *(1.0,) * (len(self.loras) - len(self.lora_scales)))
        found = tuple(find_lora(text, scale) for text, scale in zip(self.loras, scales, strict=True))
        for lora in found:
            check_fits(lora, source)
        return found

    def extended(self, loras: tuple[LoraFile, ...]) -> GenerationRequest:
        """This request with what its LoRAs were trained for, where it does not say otherwise.

        Raises:
            GenerationError: see `trained_for`.
        """
        trained = trained_for(loras, self.method, self.shift)
        stretched: dict[str, Any] = {}
        if trained.rope != "none" and self.rope == "none":
            stretched = {"rope": trained.rope, "trained_frames": self.trained_frames or trained.rope_frames}
        own = {**trained.options, **self.options.get(self.method, {})}
        return replace(
            self,
            **stretched,
            shift=trained.shift,
            num_frames=trained.frames if self.num_frames is None else self.num_frames,
            options={**self.options, self.method: own} if trained.options else self.options,
        )

    def with_usual_logits(
        self, source: ModelSource, grid: VideoGrid, loras: tuple[LoraFile, ...]
    ) -> tuple[GenerationRequest, tuple[str, ...]]:
        """This request with the UltraViCo of its preset, where that is for this length; else why not, a sentence."""
        if self.usual_ultravico is None or self.ultravico is not None:
            return self, ()
        logit, why = usual_logits(source, grid, self.usual_ultravico, self._trained_length(source, loras))
        return (self, (why,)) if logit is None else (replace(self, ultravico=logit.alpha), ())

    def _trained_frames(self, source: ModelSource) -> int | None:
        """The length up to which the rotary embedding is left alone; None where it is always."""
        if self.rope == "none":
            if self.trained_frames is not None and self.ultravico is None and self.usual_ultravico is None:
                raise GenerationError(
                    "trained_frames is for --rope riflex, ntk or pi, or for --ultravico; drop it, or choose one."
                )
            return None
        if source.pipelines.rotary == Rotary.LEARNED:
            raise GenerationError(
                f"{source.pipelines.title} learned the frequencies of its rotary embedding, so there is none to "
                "stretch; drop --rope."
            )
        return trained_length(source, self.trained_frames)

    def _logit(self, source: ModelSource, grid: VideoGrid, loras: tuple[LoraFile, ...]) -> FarLogits | None:
        """What is done to scores."""
        return far_logits(source, grid, self.ultravico, self._trained_length(source, loras))

    def _trained_length(self, source: ModelSource, loras: tuple[LoraFile, ...]) -> int:
        """Pixel frames that the model knows; a LoRA that was trained for more makes them more."""
        lengths = [lora.frames for lora in loras if lora.frames is not None]
        return trained_length(source, self.trained_frames, lengths)

    def check_words(self) -> None:
        """Raise GenerationError for what is wrong whatever the model is: texts, names, options, the seed."""
        if not self.prompt.strip():
            raise GenerationError("The prompt is empty; describe the video in a few words.")
        for what, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            if not _is_text(text):
                raise GenerationError(f"The {what} is no valid UTF-8; check the encoding of the terminal or file.")
        check_method(self.method)
        check_options_used(self.options, self.method)
        # bad options should be told before anything about the model
        make_processor(self.method, self.options.get(self.method))
        if self.rope not in ROPES:
            raise GenerationError(
                f"Unknown rope {self.rope!r}; use {', '.join(ROPES[:-1])} or {ROPES[-1]}.{nearest(self.rope, ROPES)}"
            )
        if not 0 <= self.seed < _SEED_LIMIT:
            raise GenerationError(f"seed must be 0 or more and below 2^63 (got {self.seed}); use 0.")


@dataclass(frozen=True)
class Fitted:
    """A request beside its model; fields as in `Settings`.

    Args:
        request: with what LoRAs and presets add.
    """

    request: GenerationRequest
    loras: tuple[LoraFile, ...]
    num_frames: int
    height: int
    width: int
    steps: int
    grid: VideoGrid
    windows: Windows | None
    trained_frames: int | None
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """A request with every gap filled; fields as in `GenerationRequest`.

    Args:
        request: what was asked.
        source: the model that was found.
        grid: the token grid that attention will see: of one window, where there are several.
        guidance_2: guidance scale of a second expert, None for the same.
        dtype: "fp32", "bf16" or "fp16".
        loras: to load.
        trained_frames: None without a stretched rotary embedding.
        logit: None without `ultravico`.
        windows: None where the transformer is called on the whole video.
        stack: what is combined with attention.
        notices: what the user should know before, a sentence each.
    """

    request: GenerationRequest
    source: ModelSource
    grid: VideoGrid
    num_frames: int
    height: int
    width: int
    steps: int
    guidance: float
    guidance_2: float | None
    fps: float
    device: torch.device
    dtype: str
    loras: tuple[LoraFile, ...] = ()
    shift: float | None = None
    trained_frames: int | None = None
    logit: FarLogits | None = None
    windows: Windows | None = None
    stack: Stack = field(default_factory=Stack)
    notices: tuple[str, ...] = ()


def within(name: str, asked: Number | None, default: Number, limits: tuple[float, float]) -> Number:
    """What was asked, else the default.

    Raises:
        GenerationError: it is outside `limits`, both included, or not a number.
    """
    if asked is None:
        return default
    check_within(name, asked, limits, f"; the model's is {default}" if default is not asked else "")
    return asked


def check_within(name: str, value: float, limits: tuple[float, float], advice: str = "") -> None:
    """Raise GenerationError unless a value is a number within `limits`, both included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GenerationError(f"{name} must be a number, {limits[0]} to {limits[1]} (got {value!r}){advice}.")
    if not limits[0] <= value <= limits[1]:
        raise GenerationError(f"{name} must be {limits[0]} to {limits[1]} (got {value}){advice}.")


def _is_text(text: str) -> bool:
    """Whether a text can be encoded: bytes of an argument that are no UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
