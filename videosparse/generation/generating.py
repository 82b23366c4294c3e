"""From a request to a video: once (`generate`), or with a method and dense side by side (`compare`), and to files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from videosparse.generation.errors import GenerationError
from videosparse.generation.filing import LATENTS, endings
from videosparse.generation.latents import save_latents
from videosparse.generation.methods import Options, option_names
from videosparse.generation.output import Destination, Writer, video_place
from videosparse.generation.request import GenerationRequest, Settings
from videosparse.generation.running import Progress, Run, load_pipeline, quiet, run_method
from videosparse.generation.sidecar import comparison_record, record, write_json
from videosparse.generation.step_cache import check_measured
from videosparse.generation.streaming import unstreamable
from videosparse.generation.video import Mp4Writer, side_by_side, write_mp4
from videosparse.metrics.fidelity import FidelityRow, fidelity

_WARM_UP_STEPS = 2
_CLEAR_GAIN = 1.1
"""Less is within what two runs of the same differ by, or close to it."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A generated video and how it was made.

    Args:
        settings: what it was asked to be.
        run: the frames, times and densities.
        load_seconds: wall seconds of loading the pipeline; None when it was given.
    """

    settings: Settings
    run: Run
    load_seconds: float | None

    @property
    def frames(self) -> torch.Tensor:
        """fp32 [frames, 3, height, width] in [0, 1].

        Raises:
            RuntimeError: they went to a file.
        """
        return _frames(self.run)

    def save(self, place: Destination | str | Path | None = None, overwrite: bool = False) -> dict[str, Path]:
        """Write the mp4 and its JSON record; returns the path of each ending.

        Raises:
            GenerationError: see `destination` and `Destination.publish`.
        """
        if not isinstance(place, Destination):
            place = output_place(self.settings.request, place, overwrite=overwrite)
        data = record(self.settings, self.run, self.load_seconds)
        writers: dict[str, Writer] = {
            ".mp4": lambda path: write_mp4(path, self.frames, self.settings.fps),
            ".json": lambda path: write_json(path, data),
        }
        return place.publish(writers)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A method and dense attention on the same model, prompt, seed and noise.

    Args:
        settings: of both.
        sparse, dense: the two runs.
        fidelity: PSNR and SSIM of sparse against dense.
        load_seconds: wall seconds of loading the pipeline; None when it was given.
        warmed_up: whether a short untimed run of each came before, so that kernels were compiled.
    """

    settings: Settings
    sparse: Run
    dense: Run
    fidelity: tuple[FidelityRow, ...]
    load_seconds: float | None
    warmed_up: bool

    @property
    def speedup(self) -> float:
        """Denoising time of dense over that of sparse."""
        return self.dense.timings.denoise / self.sparse.timings.denoise

    @property
    def dense_backend(self) -> str:
        """What computed the dense side, such as "native SDPA"."""
        return self.dense.report.dense_backend

    @property
    def explanation(self) -> str:
        """Why the method gained little, in one sentence; "" where it gained."""
        if self.speedup >= _CLEAR_GAIN:
            return ""
        report = self.sparse.report
        return (
            f"{self.sparse.method} keeps {report.density:.0%} of the blocks of a video this short, which is "
            f"{report.average_density:.0%} of the dense attention work with its dense steps and layers; gathering "
            "blocks costs time, too, and the rest of the model gains nothing. Longer videos gain more."
        )

    @property
    def measured(self) -> str:
        """What the times are, in one sentence."""
        how = "after a warm-up of each" if self.warmed_up else "one run of each, no warm-up"
        return f"denoising loop only, {how}, {self.sparse.method} first"

    def save(self, place: Destination | str | Path | None = None, overwrite: bool = False) -> dict[str, Path]:
        """Write both videos, the side-by-side video (dense left) and the JSON record; returns the path of each ending.

        Raises:
            GenerationError: see `destination` and `Destination.publish`.
        """
        if not isinstance(place, Destination):
            place = output_place(self.settings.request, place, overwrite=overwrite, compare=True)
        data = record(self.settings, self.sparse, self.load_seconds)
        data["comparison"] = comparison_record(
            self.dense, self.dense_backend, self.fidelity, self.speedup, self.measured
        )
        sparse, dense = _frames(self.sparse), _frames(self.dense)
        videos = {".mp4": sparse, "-dense.mp4": dense, "-compare.mp4": side_by_side(dense, sparse)}
        writers: dict[str, Writer] = {
            ending: lambda path, video=video: write_mp4(path, video, self.settings.fps)  # type: ignore[misc]
            for ending, video in videos.items()
        }
        writers[".json"] = lambda path: write_json(path, data)
        return place.publish(writers)


def _frames(run: Run) -> torch.Tensor:
    if run.frames is None:
        raise RuntimeError("The frames of this run went to its file and were not kept; read_mp4 reads them.")
    return run.frames


def output_place(
    request: GenerationRequest,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    compare: bool = False,
    latents: bool = False,
) -> Destination:
    """Where the files of a request go; call it before `generate` to learn early that they cannot.

    Raises:
        GenerationError: see `destination`.
    """
    return video_place(
        output, request.prompt, request.seed, request.method, endings=endings(compare=compare, latents=latents),
        overwrite=overwrite,
    )  # fmt: skip


def generate(request: GenerationRequest | Settings, *, pipe: Any = None, progress: Progress = quiet) -> Generation:
    """Make a video.

    Args:
        request: what to make; resolved here unless it is already.
        pipe: a pipeline of the request's model, loaded and placed; None loads it.
        progress: told about every phase; `compare` puts the method before its name ("dense denoise").

    Raises:
        GenerationError: anything about the request that cannot be carried out.
    """
    settings = request.resolve() if isinstance(request, GenerationRequest) else request
    load_seconds = None
    if pipe is None:
        pipe, load_seconds = load_pipeline(settings, progress)
    method = settings.request.method
    run = run_method(pipe, settings, method, settings.request.options.get(method, {}), progress)
    return Generation(settings, run, load_seconds)


def generate_to(
    place: Destination, request: GenerationRequest | Settings, *, pipe: Any = None, progress: Progress = quiet
) -> tuple[Generation, dict[str, Path]]:
    """Make a video straight into its file, frame by frame where the VAE allows that; see `generate`.

    Memory does not grow with the length then, beyond latents and attention. Where `place` has an ending for latents,
    these are written, too.

    Returns:
        The video, whose frames were not kept, and the path of each ending.

    Raises:
        GenerationError: as `generate` and `Destination.parts`. Nothing is left behind then.
    """
    settings = request.resolve() if isinstance(request, GenerationRequest) else request
    load_seconds = None
    if pipe is None:
        pipe, load_seconds = load_pipeline(settings, progress)
    method, latents = settings.request.method, LATENTS in place.endings
    options = settings.request.options.get(method, {})
    with place.parts() as parts:
        path, reason = parts.path(".mp4"), unstreamable(pipe.vae)
        if reason is None:
            with Mp4Writer(path, settings.fps) as video:
                run = run_method(pipe, settings, method, options, progress, sink=video.add, keep_latents=latents)
        else:
            whole = run_method(pipe, settings, method, options, progress, keep_latents=latents)
            write_mp4(path, _frames(whole), settings.fps)
            notice = f"All frames were decoded before any was written: {reason}."
            run = replace(whole, frames=None, notices=(*whole.notices, notice))
        data = record(settings, run, load_seconds)
        write_json(parts.path(".json"), data)
        if run.latents is not None:
            save_latents(parts.path(LATENTS), run.latents, data)
        return Generation(settings, run, load_seconds), parts.publish()


def compare(
    request: GenerationRequest | Settings,
    *,
    pipe: Any = None,
    progress: Progress = quiet,
    warm_up: bool | None = None,
) -> Comparison:
    """Make a video with the request's method and again with dense attention from the same noise; see `generate`.

    Args:
        request, pipe, progress: as for `generate`.
        warm_up: whether an untimed run of each, of two steps, comes first, in which kernels are compiled and chosen;
            None does so except on a CPU, where nothing is compiled.

    Raises:
        GenerationError: as `generate`, or the method is dense.
    """
    settings = request.resolve() if isinstance(request, GenerationRequest) else request
    method = settings.request.method
    check_comparable(method)
    check_measured(settings.stack.step_cache)
    load_seconds = None
    if pipe is None:
        pipe, load_seconds = load_pipeline(settings, progress)
    options = settings.request.options.get(method, {})
    if warm_up is None:
        warm_up = settings.device.type != "cpu"
    if warm_up:
        _warm_up(pipe, settings, {method: options, "dense": {}}, progress)
    sparse = run_method(pipe, settings, method, options, _labelled(progress, method))
    dense = run_method(pipe, settings, "dense", {}, _labelled(progress, "dense"))
    rows = fidelity(_frames(sparse), _frames(dense))
    return Comparison(settings, sparse, dense, rows, load_seconds, warm_up)


def check_comparable(method: str) -> None:
    """Raise GenerationError when a comparison with dense would compare dense with itself."""
    if method == "dense":
        raise GenerationError("--compare sets a sparse method against dense; choose --method radial, adaspa or paro.")


def _warm_up(pipe: Any, settings: Settings, runs: Mapping[str, Options], progress: Progress) -> None:
    """Run each method for two steps with nothing dense by schedule, so that every kernel is used once.

    What searches does so at the first step, and again at the second, which is sparse. There is no step cache, which
    could skip that.
    """
    short = replace(settings, steps=_WARM_UP_STEPS, stack=replace(settings.stack, step_cache=None))
    at_once: dict[str, object] = {"first_steps": 0, "last_steps": 0, "refresh": _WARM_UP_STEPS}
    for method, options in runs.items():
        sparse_at_once = {name: value for name, value in at_once.items() if name in option_names(method)}
        run_method(pipe, short, method, {**options, **sparse_at_once}, _labelled(progress, f"warm-up {method}"))


def _labelled(progress: Progress, run: str) -> Progress:
    """Tell which run a phase belongs to: "dense denoise"."""
    return lambda phase, done, total: progress(f"{run} {phase}", done, total)
