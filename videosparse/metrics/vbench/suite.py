"""Score a folder of videos: every dimension of every video, resumable, and going on where one of them fails.

What fails is kept as lines for people, with the name of the file, or of the dimension and the weights that it needs:
`FolderScores.complete` says whether there are any.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from videosparse.metrics.vbench import DIMENSIONS, SCALES
from videosparse.metrics.vbench.dimension import Context, Dimension, VideoScore
from videosparse.metrics.vbench.drift import CLIP_SECONDS, DriftCurve, clip_bounds, drift
from videosparse.metrics.vbench.ledger import Ledger, stamp_of
from videosparse.metrics.vbench.models import Models
from videosparse.metrics.vbench.prompts import Suite, SuitePrompt, prompt_of
from videosparse.metrics.vbench.results import DimensionResult
from videosparse.metrics.vbench.weights import MissingError
from videosparse.metrics.video import Video, VideoError, find_videos, probe_size, read_video
from videosparse.wording import install_extra, nearest

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many videos are finished, and of how many."""

_FEATURES = ("dino", "clip-b32", "clip-l14")  # models whose features of frames clips can share
_NEEDS_SUITE = ("appearance_style",)


@dataclass(eq=False)
class FolderScores:
    """What a folder was found to be.

    Args:
        results: by dimension; only those that have a score.
        missing: why a dimension that was asked for has none.
        failures: videos that could not be scored, a line each.
        notes: what is no failure and should be known.
        drift: curves of each video by its path, only of long videos.
        prompts: of each video by its path.
    """

    results: dict[str, DimensionResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drift: dict[str, list[DriftCurve]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was computed."""
        return not (self.missing or self.failures)


@dataclass(frozen=True)
class _Job:
    """One video and what it is to be scored in; `weights` are stamps of the learned models, by key."""

    path: Path
    stamp: str
    prompt: SuitePrompt
    weights: Mapping[str, str]
    dimensions: tuple[Dimension, ...]
    curves: tuple[str, ...] = ()

    def known(self, ledger: Ledger, score: Dimension | str) -> Any:
        """What the ledger knows of a dimension, or of the drift of a feature; None where it does not."""
        name, weights = self._entry(score)
        return ledger.get(self.path.name, name, self.stamp, weights)

    def keep(self, ledger: Ledger, score: Dimension | str, value: Any) -> None:
        """Enter it."""
        name, weights = self._entry(score)
        ledger.put(self.path.name, name, self.stamp, value, weights)

    def _entry(self, score: Dimension | str) -> tuple[str, str]:
        """Name of a score, and the stamp of the weights that it is made with."""
        if isinstance(score, Dimension):
            name, models = score.name, score.models
        else:
            name, models = f"drift {score}", () if score == "colour" else (score,)
        return name, " ".join(filter(None, (self.weights[key] for key in models)))


def score_folder(
    folder: Path,
    ledger: Ledger,
    *,
    dimensions: Sequence[str] | None = None,
    suite: Suite | None = None,
    models: Models | None = None,
    long: bool = False,
    mixed_sizes: bool = False,
    progress: Progress | None = None,
) -> FolderScores:
    """Score every video of a folder in every dimension.

    Args:
        folder: of files called `{prompt}-{number}.mp4`; other names are scored, too, where no suite is given.
        ledger: keeps every score as soon as it is known; what it knows already is not computed again.
        dimensions: names from `DIMENSIONS`; None takes all.
        suite: says which videos are for which dimension; None scores every video in all.
        models: the learned models.
        long: cut videos into clips of two seconds, score those, and follow the drift from the first.
        mixed_sizes: score videos of all sizes as one set; else those of another size than most are failures.
        progress: told how far the work is.

    Raises:
        ValueError: an unknown dimension, no such folder, no videos, or none that belongs to the suite.
        OSError: the ledger cannot be written.
    """
    chosen = choose(dimensions)
    models = models or Models()
    files = {stem: kinds.get("decoded") or kinds["raw"] for stem, kinds in find_videos(folder).items()}
    scores = FolderScores()
    weights = {key: models.weights.stamp(key) for dimension in chosen for key in dimension.models}
    jobs = _jobs(files, chosen, suite, scores, weights, mixed_sizes=mixed_sizes)
    _find_missing(jobs, chosen, ledger, models, scores)
    jobs = [_without(job, scores.missing, long) for job in jobs]
    for number, job in enumerate(jobs):
        if progress is not None:
            progress(job.path.name, number, len(jobs))
        _score(job, ledger, models, scores, long=long)
    if progress is not None:
        progress("", len(jobs), len(jobs))
    _collect(jobs, chosen, ledger, scores, long=long)
    return scores


def choose(names: Sequence[str] | None) -> list[Dimension]:
    """Dimensions by name, in the order of `DIMENSIONS`; None stands for all.

    Raises:
        ValueError: a name that is not among them.
    """
    for name in names or ():
        if name not in DIMENSIONS:
            what = f"{name!r} of VBench is not computed here" if name in SCALES else f"Unknown dimension {name!r}"
            raise ValueError(f"{what}; choose from: {', '.join(DIMENSIONS)}.{nearest(name, DIMENSIONS)}")
    return [dimension for name, dimension in DIMENSIONS.items() if names is None or name in names]


def _jobs(
    files: dict[str, Path],
    chosen: Sequence[Dimension],
    suite: Suite | None,
    scores: FolderScores,
    weights: Mapping[str, str],
    *,
    mixed_sizes: bool,
) -> list[_Job]:
    odd = {} if mixed_sizes else _odd_sizes(files)
    jobs, strangers = [], []
    for stem, path in files.items():
        prompt = _prompt(stem, suite)
        if prompt is None:
            strangers.append(path.name)
        elif path.name in odd:
            scores.failures.append(odd[path.name])
        else:
            scores.prompts[str(path)] = prompt.prompt
            wanted = tuple(d for d in chosen if suite is None or (d.stands_for or d.name) in prompt.dimensions)
            stamp = stamp_of(path) + (f" {json.dumps(prompt.auxiliary, sort_keys=True)}" if prompt.auxiliary else "")
            jobs.append(_Job(path, stamp, prompt, weights, wanted))
    if suite is not None:
        if len(strangers) == len(files):
            raise ValueError(
                "No video belongs to a prompt of the suite; videos must be called {prompt}-0.mp4, {prompt}-1.mp4, "
                f"... (found {strangers[0]!r})."
            )
        scores.notes += [f"{name}: its prompt is not in the suite; left out." for name in strangers]
        bare = suite.without_videos(files, [d.name for d in chosen])
        if bare:
            scores.notes.append(f"Prompts of the suite without a video: {len(bare)}, such as {bare[0]!r}.")
    return jobs


def _prompt(stem: str, suite: Suite | None) -> SuitePrompt | None:
    if suite is None:
        return SuitePrompt(prompt_of(stem), ())
    # a prompt may itself end in "-7", and its video may carry no number
    return suite.prompts.get(prompt_of(stem)) or suite.prompts.get(stem)


def _odd_sizes(files: dict[str, Path]) -> dict[str, str]:
    """Names of files whose header tells another size than most files', and a line about each."""
    sizes = {path.name: size for path in files.values() if (size := probe_size(path)) is not None}
    if not sizes:
        return {}
    (height, width), _ = Counter(sizes.values()).most_common(1)[0]
    return {
        name: f"{name}: is {h}x{w} in a folder of {height}x{width} videos; mixed sizes are scored with --mixed-sizes."
        for name, (h, w) in sizes.items()
        if (h, w) != (height, width)
    }


def _find_missing(
    jobs: Sequence[_Job], chosen: Sequence[Dimension], ledger: Ledger, models: Models, scores: FolderScores
) -> None:
    """Note the dimensions that cannot be computed, and why. Models are only loaded for what is still to do."""
    for dimension in chosen:
        mine = [job for job in jobs if dimension in job.dimensions]
        if not mine:
            scores.missing[dimension.name] = "no video of this folder is for it."
        elif dimension.name in _NEEDS_SUITE and not any(job.prompt.auxiliary for job in mine):
            scores.missing[dimension.name] = "needs a suite that names the style of each prompt (--suite)."
        elif any(job.known(ledger, dimension) is None for job in mine):
            why = _why_missing(dimension, models)
            if why:
                scores.missing[dimension.name] = why


def _why_missing(dimension: Dimension, models: Models) -> str:
    absent = [name for name in dimension.packages if importlib.util.find_spec(name) is None]
    if absent:
        return f"needs {' and '.join(absent)}: {install_extra('eval')}."
    lines = []
    for key in dimension.models:
        try:
            models.load(key)
        except MissingError as error:
            lines.append(str(error))
    return " Also: ".join(lines)


def _without(job: _Job, missing: dict[str, str], long: bool) -> _Job:
    """The job less what is missing; of a long video also its drift, by the features that are there."""
    dimensions = tuple(d for d in job.dimensions if d.name not in missing)
    loaded = {key for d in dimensions for key in d.models}
    curves = ("colour", *(key for key in ("dino", "clip-b32") if key in loaded)) if long else ()
    return replace(job, dimensions=dimensions, curves=curves)


def _score(job: _Job, ledger: Ledger, models: Models, scores: FolderScores, *, long: bool) -> None:
    """Compute what the ledger does not know of one video."""
    todo = [dimension for dimension in job.dimensions if job.known(ledger, dimension) is None]
    curves = [key for key in job.curves if job.known(ledger, key) is None]
    if not (todo or curves):
        return
    try:
        video = read_video(job.path)
        bounds = clip_bounds(video) if long else []
    except ValueError as error:
        line = str(error)
        scores.failures.append(line if line.startswith(job.path.name) else f"{job.path.name}: {line}")
        return
    context = Context(models, job.prompt.prompt, job.prompt.auxiliary)
    for dimension in todo:
        try:
            found = _over_clips(dimension, video, bounds, context) if long else dimension.score(video, context)
        except VideoError as error:
            scores.failures.append(str(error))
            continue
        if not math.isfinite(found.value):
            scores.failures.append(f"{video.name}: {dimension.name} gave {found.value}.")
            continue
        job.keep(ledger, dimension, {"value": found.value, "parts": found.parts})
    for key in curves:
        curve = drift(video, key, context)
        points = [list(curve.seconds), list(curve.cosine)] if curve else []
        job.keep(ledger, key, points)


def _over_clips(dimension: Dimension, video: Video, bounds: Sequence[tuple[int, int]], context: Context) -> VideoScore:
    """The mean over clips, as VBench-Long has it without its comparison of clips, for which there is the drift."""
    for key in set(dimension.models).intersection(_FEATURES):
        context.features(key, video)
    values = []
    for start, stop in bounds:
        part = video.part(start, stop)
        values.append(dimension.score(part, context.of_part(video, part, start, stop)).value)
    return VideoScore(sum(values) / len(values), len(values))


def _collect(
    jobs: Sequence[_Job], chosen: Sequence[Dimension], ledger: Ledger, scores: FolderScores, *, long: bool
) -> None:
    """Results from what the ledger knows of these jobs."""
    for dimension in chosen:
        found: dict[str, VideoScore] = {}
        for job in jobs:
            known = job.known(ledger, dimension) if dimension in job.dimensions else None
            if known:
                found[str(job.path)] = VideoScore(known["value"], known["parts"])
        if found:
            score = _pool_clips(found) if long else dimension.pool(list(found.values()))
            scores.results[dimension.name] = DimensionResult(score, {p: s.value for p, s in found.items()})
        elif dimension.name not in scores.missing:
            scores.missing[dimension.name] = "none of its videos could be scored."
    for job in jobs:
        points = {key: job.known(ledger, key) for key in job.curves}
        curves = [DriftCurve(key, tuple(p[0]), tuple(p[1])) for key, p in points.items() if p]
        if curves:
            scores.drift[str(job.path)] = curves
        elif [] in points.values():  # followed, and found to be one clip; what could not be read has None
            scores.notes.append(
                f"{job.path.name}: has no drift; it is not longer than one clip of {CLIP_SECONDS:g} seconds."
            )


def _pool_clips(found: dict[str, VideoScore]) -> float:
    clips = sum(score.parts for score in found.values())
    return sum(score.parts * score.value for score in found.values()) / clips
