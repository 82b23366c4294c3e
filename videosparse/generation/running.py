"""Loading a pipeline and running it once with a method, timed by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from videosparse.attach import restore, sparsify
from videosparse.clock import shift_of
from videosparse.components import targets
from videosparse.generation.compiling import compile_errors
from videosparse.generation.environment import DTYPES, now, peak_memory, reset_peak_memory
from videosparse.generation.errors import GenerationError, memory_errors, one_line
from videosparse.generation.families import Guidance
from videosparse.generation.latents import keeping, prepare_vae
from videosparse.generation.lora import check_loaded, load_loras, lora_notices
from videosparse.generation.memory import knobs
from videosparse.generation.methods import Options, make_processor, refusals, resolved_options
from videosparse.generation.request import Settings
from videosparse.generation.shifts import shifted
from videosparse.generation.stack import apply_stack
from videosparse.generation.states import model_state
from videosparse.generation.step_cache import CacheCount, step_cached, write_magnitudes
from videosparse.generation.streaming import Sink, streaming
from videosparse.models.rope import stretches
from videosparse.report import RunReport
from videosparse.stretching import context_windows, extend_rope

_FILES = "_videosparse_files"  # attribute of a pipeline: what the files that it was loaded from were then

Progress = Callable[[str, int, int], None]
"""Called with a phase ("load", "prompt", "denoise", "decode"), steps done and steps in all (0 of 1 when it starts)."""


def quiet(phase: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class Timings:
    """Wall seconds of the phases of one run; the device is waited for at every border.

    Args:
        prompt: from the call to the first forward of the transformer: text encoding, noise.
        denoise: from there to the end of the last step; maps are built and kernels compiled inside it.
        decode: from there to the frames: VAE, post-processing, and writing them where they are streamed.
        steps: of the denoising, each one's share as the host saw it (a GPU may run behind).
    """

    prompt: float
    denoise: float
    decode: float
    steps: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Args:
        method: its name.
        shift: of the noise levels; None where the scheduler has none, or one that changes with the size.
        given: the options that the user set.
        options: all options in force.
        report: what attention did.
        frames: fp32 [frames, 3, height, width] in [0, 1] on the CPU; None where they were streamed.
        timings: wall seconds.
        peak_bytes: see `environment.peak_memory`.
        notices: what the user should know about this run, a sentence each.
        latents: [1, C, F, h, w] as the VAE takes them, on the CPU; None where they were not asked for.
        cache: what the step cache did; None without one.
        model_files: `model_state` of the files that the pipeline was loaded from; of another's pipeline, as they were
            when the run began.
    """

    method: str
    shift: float | None
    given: Options
    options: Options
    report: RunReport
    frames: torch.Tensor | None
    timings: Timings
    peak_bytes: int | None
    notices: tuple[str, ...] = ()
    latents: torch.Tensor | None = None
    cache: CacheCount | None = None
    model_files: str | None = None


def load_pipeline(settings: Settings, progress: Progress = quiet) -> tuple[Any, float]:
    """The pipeline on its device, and the seconds that took.

    Raises:
        GenerationError: weights are missing or damaged, or do not fit.
    """
    from diffusers import DiffusionPipeline

    progress("load", 0, 1)
    start = time.perf_counter()
    dtypes = {"default": DTYPES[settings.dtype]}
    if settings.source.pipelines.vae_float32:
        dtypes["vae"] = torch.float32
    files = model_state(settings.source.location)  # before they are read: at worst a video is made once more
    try:
        pipe = DiffusionPipeline.from_pretrained(settings.source.location, dtype=dtypes)
    except Exception as error:  # four libraries read these files, and each raises its own
        raise GenerationError(
            f"Cannot load {settings.source.location} ({type(error).__name__}: {one_line(error)}); check its files, or "
            "download the model again."
        ) from error
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            raise GenerationError(
                f"Cannot load {settings.source.location}: weights of its {name} are missing; download the model again."
            )
    setattr(pipe, _FILES, files)
    load_loras(pipe, settings.loras)
    pipe.set_progress_bar_config(disable=True)
    prepare_vae(pipe.vae, settings.source)
    with memory_errors(lambda: knobs(pipe, settings)):
        apply_stack(pipe, settings.stack, settings.device)
    seconds = now(settings.device) - start
    progress("load", 1, 1)
    return pipe, seconds


def run_method(
    pipe: Any,
    settings: Settings,
    method: str,
    options: Options,
    progress: Progress = quiet,
    *,
    sink: Sink | None = None,
    keep_latents: bool = False,
) -> Run:
    """Make the video with a method; the pipeline has its own attention back afterwards, whatever happens.

    A step cache belongs to the method that was asked for: the dense twin of a comparison runs every step whole.

    Args:
        pipe, settings, method, options, progress: what to run.
        sink: gets the frames while they are decoded; None keeps them all.
        keep_latents: whether `Run.latents` is wanted.

    Raises:
        GenerationError: options that the method or the model refuses, LoRAs that the pipeline has not loaded, too
            little memory, or frames that are not finite. What goes wrong inside the pipeline comes through as it is.
    """
    check_loaded(pipe, settings.loras)
    files = vars(pipe)[_FILES] if _FILES in vars(pipe) else model_state(settings.source.location)
    processor = make_processor(method, options, settings.logit)
    notices = (*settings.notices, *_cuts(pipe, settings), *_beyond(settings), *_windowless(settings))
    cache = settings.stack.step_cache if method == settings.request.method else None
    kept: list[torch.Tensor] = []
    try:
        with refusals():
            extend_rope(pipe, settings.request.rope, trained_frames=settings.trained_frames)
            notices = (*notices, *_unstretched(pipe, settings))
            sparsify(pipe, processor)
        reset_peak_memory(settings.device)
        keep = keeping(pipe.vae, kept) if keep_latents else nullcontext()
        with (
            memory_errors(lambda: knobs(pipe, settings)),
            compile_errors(),
            shifted(pipe, settings.shift),
            _leading_to(pipe, settings, sink),
            keep,
            _windows(pipe, settings),
            step_cached(pipe, cache, settings.steps) as count,
        ):
            shift = shift_of(pipe.scheduler.config)
            frames, timings = _call(pipe, settings, progress)
        resolved = processor.binding.resolved
        assert resolved is not None  # the tracker sets it at the first forward
        report = processor.report()
    finally:
        restore(pipe)
    if cache is not None and cache.measures and cache.file is not None:
        write_magnitudes(cache.file, settings.source.spec, count.mean_magnitudes())
        notices = (*notices, f"No step was skipped: this run measured magnitudes for later ones into {cache.file}.")
    return Run(
        method=method,
        shift=shift,
        given=dict(options),
        options=resolved_options(resolved),
        report=report,
        frames=frames if sink is None else None,
        timings=timings,
        peak_bytes=peak_memory(settings.device),
        notices=notices,
        latents=kept[0] if kept else None,
        cache=None if cache is None else count,
        model_files=files,
    )


@contextmanager
def _leading_to(pipe: Any, settings: Settings, sink: Sink | None) -> Iterator[None]:
    """Let frames go to `sink`, if any, once they are found to be finite."""
    if sink is None:
        yield
        return

    def checked(frames: torch.Tensor) -> None:
        _check_finite(frames, settings)
        sink(frames)

    with streaming(pipe, checked):
        yield


def _windows(pipe: Any, settings: Settings) -> AbstractContextManager[None]:
    """The context windows of a run."""
    asked = settings.windows
    if asked is None:
        return nullcontext()
    stride = settings.source.spec.stride[0]
    return context_windows(pipe, frames=(asked.size - 1) * stride + 1, overlap=asked.shared * stride)


def _cuts(pipe: Any, settings: Settings) -> Iterator[str]:
    """Which of the texts are longer than what the model reads of them."""
    request, most = settings.request, settings.source.defaults.max_sequence_length
    for what, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        tokens = len(pipe.tokenizer(text, verbose=False).input_ids)
        if tokens > most:
            yield f"The {what} has {tokens} tokens and the model reads {most}: its end was cut off."


def _beyond(settings: Settings) -> Iterator[str]:
    """Which LoRAs were trained for shorter videos, or windows of them, or with another attention."""
    request, windows = settings.request, settings.windows is not None
    frames = (settings.grid.frames - 1) * settings.source.spec.stride[0] + 1
    options = request.options.get(request.method, {})
    yield from lora_notices(settings.loras, request.method, options, frames, windows=windows)


def _windowless(settings: Settings) -> Iterator[str]:
    """Whether context windows were asked for where one holds the whole video."""
    windows, frames = settings.windows, settings.source.spec.latent_frames(settings.num_frames)
    if windows is not None and frames <= windows.size:
        size = settings.request.context_frames
        yield f"--context-frames {size} changes nothing: the video has {settings.num_frames} frames, one window."


def _unstretched(pipe: Any, settings: Settings) -> Iterator[str]:
    """Whether a stretched rotary embedding was asked for where it leaves the video alone."""
    rope = settings.request.rope
    frames = settings.grid.frames  # of a window, where there are several
    seen = (frames - 1) * settings.source.spec.stride[0] + 1
    if rope != "none" and not any(stretches(transformer, seen) for transformer in targets(pipe)[1]):
        what = "windows" if settings.windows is not None else "a video"
        yield f"--rope {rope} changes nothing for {what} of {seen} frames; see README, Long videos."


@dataclass
class _Phases:
    """Marks the borders between the phases of one pipeline call."""

    device: torch.device
    progress: Progress
    borders: dict[str, float] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)

    def forward_begins(self, *_: Any) -> None:
        """Forward pre-hook of the transformers: the first call ends the prompt phase."""
        if "denoise" not in self.borders:
            self.borders["denoise"] = now(self.device)
            self.progress("prompt", 1, 1)

    def step_ends(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Step callback of the pipeline; changes nothing."""
        total = pipe.num_timesteps
        last = index + 1 == total
        self.ends.append(now(self.device) if last else time.perf_counter())
        self.progress("denoise", index + 1, total)
        if last:
            self.progress("decode", 0, 1)
        return {}


def _call(pipe: Any, settings: Settings, progress: Progress) -> tuple[torch.Tensor, Timings]:
    phases = _Phases(settings.device, progress)
    roots = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    # before the tracker's hook, so that building maps counts as denoising
    hooks = [root.register_forward_pre_hook(phases.forward_begins, prepend=True) for root in roots if root is not None]
    progress("prompt", 0, 1)
    begin = now(settings.device)
    try:
        video = pipe(**call_arguments(settings), callback_on_step_end=phases.step_ends).frames[0]
    finally:
        for hook in hooks:
            hook.remove()
    end = now(settings.device)
    progress("decode", 1, 1)
    frames = video.float().cpu()
    _check_finite(frames, settings)
    started, ends = phases.borders["denoise"], phases.ends
    steps = tuple(b - a for a, b in zip([started, *ends], ends, strict=False))
    return frames, Timings(started - begin, ends[-1] - started, end - ends[-1], steps)


def _check_finite(frames: torch.Tensor, settings: Settings) -> None:
    if not bool(frames.isfinite().all()):
        raise GenerationError(
            f"The model made frames that are not finite in {settings.dtype}; try --dtype "
            f"{'fp32' if settings.dtype != 'fp32' else 'bf16, or check its weights'}."
        )


def call_arguments(settings: Settings) -> dict[str, Any]:
    """What the pipeline is called with."""
    request = settings.request
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "num_frames": settings.num_frames,
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "max_sequence_length": settings.source.defaults.max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "pt",
    }
    if settings.source.pipelines.guidance != Guidance.EMBEDDED:
        arguments["negative_prompt"] = request.negative_prompt
    if settings.guidance_2 is not None:
        arguments["guidance_scale_2"] = settings.guidance_2
    return arguments
