"""Tables of a folder's scores, for CSV files: dimensions with totals, videos, drift."""

from __future__ import annotations

from typing import Any

from videosparse.metrics.vbench import DIMENSIONS
from videosparse.metrics.vbench.dimension import SCALES
from videosparse.metrics.vbench.drift import mean_curve
from videosparse.metrics.vbench.results import Totals, totals
from videosparse.metrics.vbench.suite import FolderScores

DIMENSION_COLUMNS = (
    "dimension", "group", "kind", "score", "low", "high", "normalised", "weight", "videos", "missing", "models",
    "formula",
)  # fmt: skip
DRIFT_COLUMNS = ("video", "feature", "seconds", "cosine", "videos")


def dimension_rows(scores: FolderScores) -> list[dict[str, Any]]:
    """A row for every dimension that was asked for or enters a total, then quality, semantic and total.

    `low` and `high` bound the 95 % bootstrap interval over videos. `missing` says why there is no score; of a total,
    how many dimensions of how many are in it.
    """
    names = [n for n in DIMENSIONS if n in scores.results or n in scores.missing]
    rows = [_dimension_row(name, scores) for name in names]
    rows += [
        {"dimension": name, "group": scale.group, "weight": scale.weight, "missing": "not computed here."}
        for name, scale in SCALES.items()
        if name not in DIMENSIONS
    ]
    return rows + _total_rows(totals({name: result.score for name, result in scores.results.items()}))


def _dimension_row(name: str, scores: FolderScores) -> dict[str, Any]:
    dimension = DIMENSIONS[name]
    row: dict[str, Any] = {
        "dimension": name, "group": dimension.group, "kind": dimension.kind, "weight": dimension.weight,
        "models": " ".join(dimension.models), "formula": dimension.formula, "missing": scores.missing.get(name, ""),
    }  # fmt: skip
    if (result := scores.results.get(name)) is not None:
        low, high = result.interval()
        row |= {
            "score": f"{result.score:.6f}", "low": f"{low:.6f}", "high": f"{high:.6f}", "videos": len(result.videos),
            "normalised": f"{dimension.scale.normalised(result.score):.6f}",
        }  # fmt: skip
    return row


def _total_rows(found: Totals) -> list[dict[str, Any]]:
    counted = {"quality": found.missing_quality, "semantic": found.missing_semantic}
    rows = []
    for group, value in (("quality", found.quality), ("semantic", found.semantic), ("total", found.total)):
        absent = counted.get(group, found.missing_quality + found.missing_semantic)
        of = len([s for s in SCALES.values() if group in ("total", s.group)])
        told = f"of {of - len(absent)} of {of} dimensions; missing: {' '.join(absent)}" if absent else ""
        rows.append({"dimension": group, "normalised": "" if value is None else f"{value:.6f}", "missing": told})
    return rows


def video_rows(scores: FolderScores) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """A row for every video that has a score, and the columns: the raw score in each dimension."""
    columns = ("video", "prompt", *scores.results)
    rows = []
    for path, prompt in scores.prompts.items():
        found = {n: f"{r.videos[path]:.6f}" for n, r in scores.results.items() if path in r.videos}
        if found:
            rows.append({"video": path, "prompt": prompt, **found})
    return rows, columns


def drift_rows(scores: FolderScores) -> list[dict[str, Any]]:
    """A row for every point of every video's drift curves; the rows of their means, `video` "mean", come first."""
    features = dict.fromkeys(curve.feature for curves in scores.drift.values() for curve in curves)
    rows = []
    for feature in features:
        mine = [c for curves in scores.drift.values() for c in curves if c.feature == feature]
        for seconds, cosine, count in mean_curve(mine):
            rows.append(_drift_row("mean", feature, seconds, cosine, count))
    for path, curves in scores.drift.items():
        for curve in curves:
            for seconds, cosine in zip(curve.seconds, curve.cosine, strict=True):
                rows.append(_drift_row(path, curve.feature, seconds, cosine, 1))
    return rows


def _drift_row(video: str, feature: str, seconds: float, cosine: float, count: int) -> dict[str, Any]:
    return {
        "video": video, "feature": feature, "seconds": f"{seconds:.3f}", "cosine": f"{cosine:.6f}", "videos": count,
    }  # fmt: skip
