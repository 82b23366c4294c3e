"""Scores of a folder: VBench's results file written and read, totals with missing dimensions named, intervals.

VBench's file, `{name}_eval_results.json`, holds for each dimension the score of the folder and those of its videos:

    {"dimension": [score, [{"video_path": "...", "video_results": score}, ...]]}

Its own summariser reads the first of the two. What that shape has no place for (exact, near or proxy; formulas; what is
missing) goes into tables beside it, never into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videosparse.files import write_json
from videosparse.metrics.bootstrap import interval
from videosparse.metrics.vbench import DIMENSIONS, SCALES

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


@dataclass(frozen=True)
class DimensionResult:
    """One dimension of a folder.

    Args:
        score: raw, as in the range of the dimension.
        videos: raw score of each video by its path.
    """

    score: float
    videos: Mapping[str, float] = field(default_factory=dict)

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over videos."""
        _, low, high = interval(list(self.videos.values()))
        return low, high


@dataclass(frozen=True)
class Totals:
    """VBench's totals, of what there is.

    Args:
        quality, semantic: weighted means of normalised scores; None where no dimension of the group is there.
        missing_quality, missing_semantic: dimensions that are not in them.
    """

    quality: float | None
    semantic: float | None
    missing_quality: tuple[str, ...]
    missing_semantic: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all sixteen dimensions are there, so that the total compares with published ones."""
        return not (self.missing_quality or self.missing_semantic)

    @property
    def total(self) -> float | None:
        """(4 quality + semantic) / 5; None where one of them has no dimension at all."""
        if self.quality is None or self.semantic is None:
            return None
        weighted = QUALITY_WEIGHT * self.quality + SEMANTIC_WEIGHT * self.semantic
        return weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def totals(scores: Mapping[str, float]) -> Totals:
    """Quality, semantic and total of raw scores by dimension. A missing one is left out and named, never counted as 0.

    VBench's script counts it as 0 and does not clip; on complete scores inside the ranges both agree.
    """
    means: dict[str, float | None] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for group in ("quality", "semantic"):
        members = {name: scale for name, scale in SCALES.items() if scale.group == group}
        there = {name: scale for name, scale in members.items() if name in scores}
        weight = sum(scale.weight for scale in there.values())
        weighted = sum(scale.weight * scale.normalised(scores[name]) for name, scale in there.items())
        means[group] = weighted / weight if there else None
        missing[group] = tuple(name for name in members if name not in scores)
    return Totals(means["quality"], means["semantic"], missing["quality"], missing["semantic"])


def save_results(path: Path, results: Mapping[str, DimensionResult]) -> None:
    """Write VBench's results file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    told: dict[str, Any] = {}
    for name, result in results.items():
        times = DIMENSIONS[name].told_times if name in DIMENSIONS else 1.0
        videos = [{"video_path": path, "video_results": value * times} for path, value in result.videos.items()]
        told[name] = [result.score, videos]
    write_json(path, told)


def load_results(path: Path) -> dict[str, DimensionResult]:
    """Read a results file, ours or VBench's.

    Raises:
        ValueError: it cannot be read, holds no dimension, has another shape, or a score that is no finite number; one
            line for people.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as results ({error}).") from error
    if not isinstance(told, Mapping):
        raise ValueError(f"{path} holds no results: expected dimensions by name.")
    if not told:
        raise ValueError(f"{path} holds no dimension; expected at least one with a score.")
    return {name: _read_dimension(name, entry, path) for name, entry in told.items()}


def _read_dimension(name: str, entry: Any, path: Path) -> DimensionResult:
    """VBench puts further numbers beside a video's score, and booleans for dynamic_degree."""
    times = DIMENSIONS[name].told_times if name in DIMENSIONS else 1.0
    try:
        score, videos = entry
        found = {str(v["video_path"]): float(v["video_results"]) / times for v in videos}
        result = DimensionResult(float(score), found)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path}: {name} has another shape than [score, [{{video_path, video_results}}, ...]] ({error!r})."
        ) from error
    for place, value in {"": result.score, **{f" of {video}": value for video, value in found.items()}}.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{path}: the score of {name}{place} must be a finite number (got {value}); score it anew."
            )
    return result
