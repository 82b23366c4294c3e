"""What a row says about one video: likeness to its dense twin, what the world's detectors see, dimensions.

Every quantity that can drift comes by quarter of the video, too: columns ending in _q1 to _q4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from videosparse.evaluation.prompts import Prompt
from videosparse.metrics.fidelity import psnr, quarter_means, relative_l1, ssim
from videosparse.metrics.vbench import DIMENSIONS as ALL_DIMENSIONS
from videosparse.metrics.vbench import WITHOUT_WEIGHTS, Context
from videosparse.metrics.vbench.drift import drift
from videosparse.metrics.video import as_video
from videosparse.metrics.world import ObjectReport, analyse, score

QUARTERS = 4
QUESTIONS = ("colour", "shape", "motion", "count", "background", "all")


DIMENSIONS = {name: ALL_DIMENSIONS[name] for name in WITHOUT_WEIGHTS}
"""The dimensions of VBench that need no download: a column each."""


def _quarterly(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_q{number}" for number in range(1, QUARTERS + 1))


FIDELITY = (
    "psnr_db", "ssim", "worst_psnr_db", "latent_l1", *_quarterly("psnr_db"), *_quarterly("ssim"),
    *_quarterly("latent_l1"),
)  # fmt: skip
WORLD = (
    *(f"{question}_right" for question in QUESTIONS), "permanence", "longest_gap", "switches", "frozen", "overlap",
    "colour_error", "jerk", "speed_variation", *_quarterly("permanence"), *_quarterly("colour_error"),
    *_quarterly("radius"),
)  # fmt: skip


def fidelity_columns(
    video: torch.Tensor, dense: torch.Tensor, latents: torch.Tensor, dense_latents: torch.Tensor
) -> dict[str, Any]:
    """How like its dense twin a video is, on raw tensors; conventions in `metrics/fidelity.py`.

    Args:
        video, dense: [frames, 3, height, width] in [0, 1].
        latents, dense_latents: what was decoded, [channels, latent frames, height, width].
    """
    noise = psnr(video, dense)
    row: dict[str, Any] = {"worst_psnr_db": _round(noise.min())}
    distance = relative_l1(latents, dense_latents)
    for name, frames in (("psnr_db", noise), ("ssim", ssim(video, dense)), ("latent_l1", distance)):
        row[name] = _round(frames.mean())
        row |= _by_quarter(name, quarter_means(tuple(frames.tolist())))
    return row


@dataclass(frozen=True, eq=False)
class Seen:
    """A video as it goes to a worker, on the CPU.

    Args:
        video: fp32 [frames, 3, height, width] in [0, 1].
        latents: what was decoded, [channels, latent frames, height, width]; None where nothing was.
        prompt: that it was made from.
        fps: frames a second.
    """

    video: torch.Tensor
    latents: torch.Tensor | None
    prompt: Prompt
    fps: float


def judged(seen: Seen, dense: Seen | None) -> dict[str, Any]:
    """All columns that pictures tell, against the dense twin where there is one.

    Raises:
        ValueError: fewer than 3 frames, or frames below 16 pixels a side.
    """
    row = seen_columns(seen.video, seen.prompt, seen.fps)
    if dense is not None and dense.latents is not None and seen.latents is not None:
        row |= fidelity_columns(seen.video, dense.video, seen.latents, dense.latents)
    return row


def seen_columns(video: torch.Tensor, prompt: Prompt, fps: float) -> dict[str, Any]:
    """What can be seen in a video by itself: dimensions, drift, and for prompts of the world what the detectors find.

    `drift` is a list of seconds:cosine, how like the first two seconds later ones are by their colours; videos that are
    no longer than that have none.

    Args:
        video: [frames, 3, height, width] in [0, 1], on the CPU.
        prompt: that it was made from.
        fps: frames a second.

    Raises:
        ValueError: fewer than 3 frames, or frames below 16 pixels a side.
    """
    told, context = as_video(video, fps, prompt.prompt), Context(prompt=prompt.prompt)
    row: dict[str, Any] = {name: _round(one.score(told, context).value) for name, one in DIMENSIONS.items()}
    curve = drift(told, "colour")
    if curve is not None:
        pairs = zip(curve.seconds, curve.cosine, strict=True)
        row["drift"] = " ".join(f"{seconds:g}:{cosine:.5f}" for seconds, cosine in pairs)
    return row | (world_columns(video.transpose(0, 1), prompt, fps) if prompt.of_world else {})


def world_columns(video: torch.Tensor, prompt: Prompt, fps: float) -> dict[str, Any]:
    """What the detectors see of what a prompt promises.

    What a prompt does not name, and quantities of objects that are not there, stay empty.

    Args:
        video: [3, frames, height, width] in [0, 1].
        prompt: of the synthetic world.
        fps: frames a second.
    """
    frames = video.shape[1]
    report = analyse(video, fps=fps)
    result = score(report, prompt.expected(), frames=frames)
    right = {name: getattr(result, "all_right" if name == "all" else name) for name in QUESTIONS}
    row: dict[str, Any] = {f"{name}_right": None if value is None else int(value) for name, value in right.items()}
    row |= {
        "permanence": _round(result.permanence), "longest_gap": result.longest_gap, "switches": result.switches,
        "frozen": _round(report.frozen),
    }  # fmt: skip
    seen = [d for d in result.detected if d]
    for name in ("overlap", "colour_error", "jerk", "speed_variation"):
        row[name] = _round(_mean(getattr(d, name) for d in seen))
    row |= _by_quarter(
        "permanence", [_mean(part) for part in zip(*(_alive(d, frames) for d in result.detected), strict=True)]
    )
    for name, attribute in (("colour_error", "colour_error_by_quarter"), ("radius", "radius_by_quarter")):
        found = [[getattr(d, attribute)[q] for d in seen] for q in range(QUARTERS)]
        row |= _by_quarter(name, [_mean(x for x in quarter if not math.isnan(x)) for quarter in found])
    return row


def _alive(seen: ObjectReport | None, frames: int) -> list[float]:
    """In which share of the frames of each quarter an object was seen; NaN where a quarter has no frame."""
    quarter = np.arange(frames) * QUARTERS // frames
    there = np.zeros(frames)
    if seen is not None:
        there[seen.path[:, 0].astype(int)] = 1
    return [float(there[quarter == q].mean()) if (quarter == q).any() else math.nan for q in range(QUARTERS)]


def _by_quarter(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {column: _round(value) for column, value in zip(_quarterly(name), values, strict=True)}


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    listed = [float(value) for value in values]
    return math.fsum(listed) / len(listed) if listed else math.nan


def _round(value: Any) -> float | None:
    """Six digits; None for what is no number."""
    number = float(value)
    return None if math.isnan(number) else float(f"{number:.6g}")
