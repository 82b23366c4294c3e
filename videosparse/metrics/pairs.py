"""Fidelity of a folder of videos to another folder of the same names: rows for a table, a video each, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from videosparse.metrics.fidelity import CONVENTION, Perceptual, convention_named, fidelity
from videosparse.metrics.vbench.ledger import Ledger, stamp_of
from videosparse.metrics.video import VideoError, find_videos, read_latents, read_video
from videosparse.mp4 import decode_again

Files = dict[str, Path]

METRICS = ("psnr", "ssim", "lpips", "latent_l1")
COLUMNS = (
    "video", "frames_from", "convention", *METRICS, *(f"worst_{name}" for name in METRICS),
    *(f"{name}_q{quarter}" for name in METRICS for quarter in (1, 2, 3, 4)),
)  # fmt: skip


@dataclass(eq=False)
class PairScores:
    """What comparing two folders found.

    Args:
        rows: a row a video, see `COLUMNS`; what was not computed is absent.
        failures: videos that could not be compared, a line each.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def score_pairs(
    folder: Path,
    reference: Path,
    ledger: Ledger,
    *,
    convention: str = CONVENTION,
    decoded: bool = False,
    perceptual: Perceptual | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PairScores:
    """Compare every video with the one of the same name in the reference folder.

    Frames are taken raw where both folders have a raw file (`videosparse.metrics.video.save_raw`) of that name, else
    both from decoded files; a raw file without a decoded one beside it is encoded and decoded for that.

    Args:
        folder, reference: of videos.
        ledger: keeps every row as soon as it is known.
        convention: see `videosparse.metrics.fidelity`.
        decoded: take decoded files even where both have raw ones.
        perceptual: LPIPS in this convention; None leaves it out.
        progress: told how far the work is.

    Raises:
        ValueError: an unknown convention, or a folder without videos.
    """
    convention_named(convention)
    mine, theirs = find_videos(folder), find_videos(reference)
    found = PairScores()
    for number, (stem, files) in enumerate(mine.items()):
        if progress is not None:
            progress(stem, number, len(mine))
        if stem not in theirs:
            name = (files.get("decoded") or files["raw"]).name
            found.failures.append(f"{name}: {reference} has no video of that name.")
            continue
        raw = not decoded and "raw" in files and "raw" in theirs[stem]
        what = f"fidelity {convention} {'raw' if raw else 'decoded'}{'' if perceptual is None else ' lpips'}"
        stamp = stamp_of(*files.values(), *theirs[stem].values())
        row = ledger.get(stem, what, stamp)
        if row is None:
            try:
                row = _compare(stem, files, theirs[stem], convention, raw, perceptual)
            except (VideoError, ValueError, TypeError) as error:
                line = str(error)
                found.failures.append(line if line.startswith(stem) else f"{stem}: {line}")
                continue
            ledger.put(stem, what, stamp, row)
        found.rows.append(row)
    if progress is not None:
        progress("", len(mine), len(mine))
    return found


def _compare(
    stem: str, mine: Files, theirs: Files, convention: str, raw: bool, perceptual: Perceptual | None
) -> dict[str, Any]:
    video, reference = (_frames(files, raw) for files in (mine, theirs))
    if video.shape != reference.shape:
        told = [f"{x.shape[0]} frames of {x.shape[2]}x{x.shape[3]}" for x in (video, reference)]
        raise VideoError(f"{stem}: has {told[0]}, its reference {told[1]}; only equal ones can be compared.")
    pair = tuple(_latents(files) for files in (mine, theirs))
    latents = (pair[0], pair[1]) if pair[0] is not None and pair[1] is not None else None
    row: dict[str, Any] = {"video": stem, "frames_from": "raw" if raw else "decoded", "convention": convention}
    for metric in fidelity(video, reference, convention, perceptual=perceptual, latents=latents):
        row |= {metric.metric: metric.value, f"worst_{metric.metric}": metric.worst}
        for quarter, value in enumerate(metric.per_quarter, 1):
            if not math.isnan(value):  # a video of less than four frames has empty ones
                row[f"{metric.metric}_q{quarter}"] = value
    return row


def _latents(files: Files) -> torch.Tensor | None:
    path = files.get("raw") or files.get("latents")
    return None if path is None else read_latents(path)


def _frames(files: Files, raw: bool) -> torch.Tensor:
    """fp32 [frames, 3, height, width] in [0, 1]."""
    if raw:
        return read_video(files["raw"]).unit()
    if "decoded" in files:
        return read_video(files["decoded"]).unit()
    video = read_video(files["raw"])
    return decode_again(video.unit(), video.fps)
