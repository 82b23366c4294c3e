"""What a row says about one video: likeness to its dense twin, what the world's detectors see, dimensions.

Every quantity that can drift comes by quarter of the video, too: columns ending in _q1 to _q4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from videosparse.evaluation.prompts import Prompt
from videosparse.generation.video import to_uint8
from videosparse.metrics.fidelity import psnr, ssim
from videosparse.metrics.world import ObjectReport, analyse, score

QUARTERS = 4
QUESTIONS = ("colour", "shape", "motion", "count", "background", "all")


def temporal_flickering(video: torch.Tensor) -> float:
    """VBench's formula, 0..1: (255 - mean absolute difference of adjacent frames) / 255, frames as 8-bit levels.

    Differs from VBench: it leaves out videos that move, by optical flow; here every video counts, so that compare only
    the same prompts.

    Args:
        video: [frames, 3, height, width] in [0, 1], at least two frames.
    """
    frames = to_uint8(video).float()
    return 1 - float((frames[1:] - frames[:-1]).abs().mean()) / 255


DIMENSIONS: dict[str, Callable[[torch.Tensor], float]] = {"temporal_flickering": temporal_flickering}
"""The dimensions that need no weights: a column each, of a video [frames, 3, height, width] in [0, 1]."""


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
        latents, dense_latents: what was decoded, [channels, latent frames, height, width]; their distance is relative,
            sum |a - b| / sum |b|.
    """
    noise, likeness = psnr(video, dense), ssim(video, dense)
    row: dict[str, Any] = {"worst_psnr_db": _round(noise.min())}
    for name, frames in (("psnr_db", noise), ("ssim", likeness)):
        row[name] = _round(frames.mean())
        row |= _by_quarter(name, [_mean(part) for part in _quarters(frames)])
    a, b = latents.double(), dense_latents.double()
    off, size = ((x.abs().sum(dim=(0, 2, 3))).cpu() for x in (a - b, b))
    row["latent_l1"] = _round(off.sum() / size.sum())
    parts = zip(_quarters(off), _quarters(size), strict=True)
    return row | _by_quarter("latent_l1", [float(x.sum() / y.sum()) for x, y in parts])


def dimension_columns(video: torch.Tensor) -> dict[str, Any]:
    """`DIMENSIONS` of a video [frames, 3, height, width] in [0, 1]."""
    return {name: _round(measure(video)) for name, measure in DIMENSIONS.items()}


def world_columns(video: torch.Tensor, prompt: Prompt, fps: float) -> dict[str, Any]:
    """What the detectors see of what a prompt promises; runs in a worker, which must not take every core.

    What a prompt does not name, and quantities of objects that are not there, stay empty.

    Args:
        video: [3, frames, height, width] in [0, 1].
        prompt: of the synthetic world.
        fps: frames a second.
    """
    torch.set_num_threads(1)
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
        quarters = [[getattr(d, attribute)[q] for d in seen] for q in range(QUARTERS)]
        row |= _by_quarter(name, [_mean(x for x in quarter if not math.isnan(x)) for quarter in quarters])
    return row


def _alive(seen: ObjectReport | None, frames: int) -> list[float]:
    """In which share of the frames of each quarter an object was seen; NaN where a quarter has no frame."""
    quarter = np.arange(frames) * QUARTERS // frames
    there = np.zeros(frames)
    if seen is not None:
        there[seen.path[:, 0].astype(int)] = 1
    return [float(there[quarter == q].mean()) if (quarter == q).any() else math.nan for q in range(QUARTERS)]


def _quarters(values: torch.Tensor) -> list[torch.Tensor]:
    """Values of frames [F], by quarter of the video."""
    quarter = torch.arange(len(values)) * QUARTERS // len(values)
    return [values[quarter == q] for q in range(QUARTERS)]


def _by_quarter(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {column: _round(value) for column, value in zip(_quarterly(name), values, strict=True)}


def _mean(values: Iterable[float] | torch.Tensor) -> float:
    """NaN of nothing."""
    listed = [float(value) for value in values]
    return math.fsum(listed) / len(listed) if listed else math.nan


def _round(value: Any) -> float | None:
    """Six digits; None for what is no number."""
    number = float(value)
    return None if math.isnan(number) else float(f"{number:.6g}")
