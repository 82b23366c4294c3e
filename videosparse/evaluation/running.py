"""Videos of many prompts at once, by any method, with what a comparison wants to know of them: `Batches`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from videosparse.attach import restore, sparsify, tracker_of
from videosparse.cases import ModelSpec
from videosparse.components import targets
from videosparse.evaluation.maps import MapPicture, drawn, maps_of
from videosparse.evaluation.prompts import Prompt
from videosparse.evaluation.weights import weights_id
from videosparse.generation.environment import now
from videosparse.generation.errors import GenerationError, memory_errors
from videosparse.generation.methods import refusals
from videosparse.generation.request import GenerationRequest, Settings
from videosparse.generation.running import call_arguments, load_pipeline
from videosparse.processors import Processor
from videosparse.synthetic.render import render

_WARM_STEPS = 5
"""Enough for a dense step, a search, sparse steps and a refresh with the published schedules."""

_TOKENS = 350_000
"""Video tokens of a batch on a GPU: 64 videos of 81 frames of the embedded model, which keep it busy."""


@dataclass(frozen=True, eq=False)
class Made:
    """Videos of one batch.

    Args:
        videos: [B, frames, 3, height, width] in [0, 1], on the device, as the pipeline returned them.
        latents: what was decoded, [B, channels, latent frames, height, width]; None for the ceiling.
        count: how many were made at once.
        seconds: wall seconds of the whole call, a video's share; None for the ceiling.
        denoise_seconds: of them until the last denoising step was done, text encoding included.
        video_density, average_density: see `RunReport`; None for the ceiling.
        picture: of the maps at the last step of each expert, where it was asked for and there are any.
    """

    videos: torch.Tensor
    latents: torch.Tensor | None = None
    count: int = 0
    seconds: float | None = None
    denoise_seconds: float | None = None
    video_density: float | None = None
    average_density: float | None = None
    picture: MapPicture | None = None


class Batches:
    """A model at one size, ready to make batches of videos.

    Args:
        settings: model, size, schedule, device and precision; see `settings_of`.
        pipe: loaded already, of the same model, device and dtype.

    Raises:
        GenerationError: weights that cannot be loaded.
    """

    def __init__(self, settings: Settings, pipe: Any = None) -> None:
        self.settings = settings
        self.pipe = load_pipeline(settings)[0] if pipe is None else pipe
        self.weights = weights_of(settings)

    def size(self, prompts: int) -> int:
        """How many videos to make at once where nobody says."""
        if self.settings.device.type == "cpu":
            return min(prompts, 4)
        return max(1, min(prompts, _TOKENS // self.settings.grid.tokens))

    @torch.inference_mode()
    def make(
        self, prompts: Sequence[Prompt], processor: Processor, *, seed_shift: int = 0, picture: bool = False
    ) -> Made:
        """The videos of some prompts by a method; the pipeline has its own attention back afterwards.

        Args:
            prompts: at least one.
            processor: the method.
            seed_shift: added to the seeds of the noise.
            picture: whether to draw the block maps of the last step.

        Raises:
            GenerationError: what the method or the model refuses, too little memory, or frames that are not finite.
        """
        with refusals():
            sparsify(self.pipe, processor)
        try:
            with memory_errors(), _any_size(self.pipe):
                made = self._call(prompts, seed_shift, picture)
            report = processor.report()
            return replace(made, video_density=report.video_density, average_density=report.average_density)
        finally:
            restore(self.pipe)

    def warm_up(self, prompts: Sequence[Prompt], processor: Processor) -> None:
        """Let a method compile its kernels before it is timed; nothing on a CPU, where none are."""
        if self.settings.device.type == "cpu":
            return
        with refusals():
            sparsify(self.pipe, processor)
        try:
            with torch.inference_mode(), memory_errors(), _any_size(self.pipe):
                arguments = self._arguments(prompts[:16], 0) | {"output_type": "latent"}
                self.pipe(**arguments | {"num_inference_steps": min(_WARM_STEPS, self.settings.steps)})
        finally:
            restore(self.pipe)

    @torch.inference_mode()
    def through_vae(self, prompts: Sequence[Prompt]) -> Made:
        """The rendered truth of prompts of the synthetic world, encoded and decoded.

        Raises:
            GenerationError: a model without a causal VAE of RGB video, or a prompt that is not of the world.
        """
        settings, vae = self.settings, self.pipe.vae
        if not all(prompt.of_world for prompt in prompts):
            raise GenerationError("The ceiling renders the truth of prompts of the synthetic world; use such a list.")
        truth = render(
            [p.scene() for p in prompts], settings.num_frames, settings.height, settings.width, device=vae.device
        )
        latents = vae.encode((truth * 2 - 1).to(vae.dtype)).latent_dist.mode()
        decoded: torch.Tensor = vae.decode(latents).sample
        return Made((decoded.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2), count=len(prompts))

    def _arguments(self, prompts: Sequence[Prompt], seed_shift: int) -> dict[str, Any]:
        arguments = call_arguments(self.settings)
        texts = [prompt.prompt for prompt in prompts]
        noise = [torch.Generator("cpu").manual_seed(prompt.seed + seed_shift) for prompt in prompts]
        more: dict[str, Any] = {"prompt": texts, "generator": noise}
        if "negative_prompt" in arguments:
            more["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
        return arguments | more

    def _call(self, prompts: Sequence[Prompt], seed_shift: int, picture: bool) -> Made:
        device = self.settings.device
        last: dict[str, Any] = {"picturing": 0.0, "maps": []}

        def step_ends(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index + 1 == pipe.num_timesteps:
                last.update(latents=tensors["latents"], end=now(device) - last["picturing"])
            done = _done(pipe, index) if picture else None
            if done is not None:
                started = now(device)
                last["maps"] += [maps] if (maps := maps_of(done)) is not None else []
                last["picturing"] += now(device) - started
            return {}

        begin = now(device)
        videos = self.pipe(**self._arguments(prompts, seed_shift), callback_on_step_end=step_ends).frames
        seconds = now(device) - begin - last["picturing"]
        if not bool(videos.isfinite().all()):
            raise GenerationError(f"The model made frames that are not finite in {self.settings.dtype}; try --dtype.")
        count = len(prompts)
        shares = (seconds / count, (last["end"] - begin) / count)
        return Made(videos, last["latents"], count, *shares, picture=drawn(last["maps"]))


def _done(pipe: Any, index: int) -> torch.nn.Module | None:
    """The transformer whose last step of a run this was, if it was one's."""
    for transformer in targets(pipe)[1]:
        tracker = tracker_of(transformer)
        first, steps = tracker.session.clock.part(tracker.expert) or (0, pipe.num_timesteps)
        if index + 1 == first + steps:
            return transformer
    return None


def settings_of(
    model: str | None = None,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Settings:
    """What `Batches` are made of, before any weights are loaded.

    Args:
        model: folder, hub id or name; None is the embedded model.
        frames, height, width, steps, guidance: None takes the model's default.
        device, dtype: see `GenerationRequest`.

    Raises:
        GenerationError: a value that the model cannot take.
    """
    return _resolve(
        GenerationRequest(
            "any", model=model, method="dense", num_frames=frames, height=height, width=width, steps=steps,
            guidance=guidance, device=device, dtype=dtype,
        )
    )  # fmt: skip


def weights_of(settings: Settings) -> str:
    """What tells the weights of a model apart, as rows have it; "" where it has no place of its own."""
    location = settings.source.location
    return "" if location is None else weights_id(location)


def _resolve(request: GenerationRequest) -> Settings:
    """The settings of a request; also for sizes that the model takes, but its pipeline refuses (see `_any_size`)."""
    height, width = request.height, request.width
    if height is None or width is None or not (height % 16 or width % 16):
        return request.resolve()
    allowed = replace(request, height=max(16, height // 16 * 16), width=max(16, width // 16 * 16))
    settings = allowed.resolve()
    spec: ModelSpec = settings.source.spec
    with refusals():
        grid = spec.grid(settings.num_frames, height, width)
    return replace(settings, request=request, grid=grid, height=height, width=width)


@contextmanager
def _any_size(pipe: Any) -> Iterator[None]:
    """Let heights and widths pass that the VAE and the patches divide, but 16 does not.

    Wan's pipeline asks for multiples of 16, whatever its VAE: with the embedded model's, 8 is enough, and a grid that
    divides by nothing is what a method has to be tried on. The check runs on the size below, for all else it says.
    """
    check = pipe.check_inputs

    def lenient(prompt: Any, negative_prompt: Any, height: int, width: int, *rest: Any) -> None:
        check(prompt, negative_prompt, height // 16 * 16, width // 16 * 16, *rest)

    if type(pipe).__name__ != "WanPipeline":
        yield
        return
    vars(pipe)["check_inputs"] = lenient
    try:
        yield
    finally:
        del vars(pipe)["check_inputs"]
