"""Many videos with one model: what a killed batch has made already is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from videosparse.generation.errors import GenerationError
from videosparse.generation.filing import LATENTS, endings, read_record, record_of_latents
from videosparse.generation.generating import Generation, generate_to
from videosparse.generation.output import DEFAULT_FOLDER, Destination, check_places, slug
from videosparse.generation.request import GenerationRequest, Settings
from videosparse.generation.running import Progress, load_pipeline, quiet
from videosparse.generation.sidecar import fingerprint
from videosparse.generation.states import model_state
from videosparse.generation.step_cache import check_measured

Told = Callable[[int, Generation | None, dict[str, Path]], None]
"""Called after each video with its number from 0, the video (None: it was there already), and its files."""


@dataclass(frozen=True)
class Batch:
    """Videos to make, all with the same model on the same device.

    Args:
        runs: of each video.
        folder: where they go.
        latents: whether latents are kept, too.
        overwrite: make again what is there.
    """

    runs: tuple[Settings, ...]
    folder: Path
    latents: bool = False
    overwrite: bool = False

    def place(self, number: int) -> Destination:
        """Where the files of a video go: its number comes first, so that no two of a batch want one name."""
        request = self.runs[number].request
        stem = f"{number + 1:03d}-{slug(request.prompt)}-{request.seed}-{request.method}"
        names = endings(latents=self.latents)
        return Destination(self.folder, stem, names, number=not self.overwrite, overwrite=self.overwrite)

    def done(self) -> dict[str, Path]:
        """The videos in the folder that a batch has finished, by fingerprint."""
        found: dict[str, Path] = {}
        if self.overwrite or not self.folder.is_dir():
            return found
        model = model_state(self.runs[0].source.location)
        for path in sorted(self.folder.glob("*.json")):
            record = read_record(path)
            if record is None or "comparison" in record or (record.get("model") or {}).get("files", model) != model:
                continue
            if self._is_whole(path, record):
                found[str(record.get("fingerprint"))] = path.with_suffix(".mp4")
        return found

    def _is_whole(self, path: Path, record: Mapping[str, object]) -> bool:
        """Whether all files of the video are beside its record, and latents are its own."""
        if not all(_has_content(path.with_suffix(ending)) for ending in endings(latents=self.latents)):
            return False
        if not self.latents:
            return True
        kept = record_of_latents(path.with_suffix(LATENTS))
        return kept is not None and kept.get("fingerprint") == record.get("fingerprint")


def plan_batch(
    requests: Sequence[GenerationRequest],
    output: str | Path | None = None,
    *,
    latents: bool = False,
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
) -> Batch:
    """Check every video of a batch, and the names of all their files, before any is made.

    Args:
        requests: at least one.
        output: a folder; None is outputs/.
        latents, overwrite: see `Batch`.
        labels: what errors call each request, such as "prompts.txt, line 3"; None numbers them.

    Raises:
        GenerationError: the first thing that is wrong, with the label of its request; an output that is no folder, or
            in which one of the files cannot be written.
    """
    folder = Path(DEFAULT_FOLDER if output is None else output)
    if folder.suffix == ".mp4":
        raise GenerationError(f"--output must be a folder for a prompt file (got {str(output)!r}); use {folder.stem}/.")
    runs = []
    for number, request in enumerate(requests, 1):
        try:
            runs.append(request.resolve())
            check_measured(runs[-1].stack.step_cache)
        except GenerationError as error:
            label = f"Prompt {number} of {len(requests)}" if labels is None else labels[number - 1]
            raise GenerationError(f"{label}: {error}") from error
        if _loaded(runs[-1]) != _loaded(runs[0]):
            raise GenerationError(
                f"Prompt {number} of {len(requests)} asks for another model, dtype, device, offload, linears, "
                "compiling or LoRA than the first one, and a batch loads one pipeline; make a batch of each."
            )
    batch = Batch(tuple(runs), folder, latents, overwrite)
    check_places([batch.place(number) for number in range(len(runs))])
    return batch


def run_batch(batch: Batch, told: Told, progress: Progress = quiet, numbers: Iterable[int] | None = None) -> None:
    """Make the videos that are not there yet, in order; the model is loaded when the first one needs it.

    Args:
        batch: see `plan_batch`.
        told: see `Told`.
        progress: told about every phase; the number of the video comes before its name ("3/8 denoise").
        numbers: of the videos to make, from 0, where several processes share a batch; None makes all.

    Raises:
        GenerationError: see `generate`.
    """
    done, pipe, load_seconds = batch.done(), None, None
    for number in range(len(batch.runs)) if numbers is None else numbers:
        settings = batch.runs[number]
        key = fingerprint(settings)
        if key in done:
            told(number, None, {".mp4": done[key]})
            continue
        if pipe is None:
            pipe, load_seconds = load_pipeline(settings, progress)
        place = batch.place(number)
        result, paths = generate_to(place, settings, pipe=pipe, progress=_numbered(progress, number, len(batch.runs)))
        done[key] = paths[".mp4"]
        told(number, Generation(result.settings, result.run, load_seconds), paths)
        load_seconds = None


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _loaded(run: Settings) -> tuple[object, ...]:
    """What a pipeline is loaded with."""
    loras = [(lora.path, lora.scale) for lora in run.loras]
    stack = run.stack
    return run.source.location, run.dtype, run.device, stack.offload, stack.linears, stack.compiled, loras


def _numbered(progress: Progress, number: int, count: int) -> Progress:
    return lambda phase, done, total: progress(f"{number + 1}/{count} {phase}", done, total)
