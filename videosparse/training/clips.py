"""Where clips come from: a folder of videos with captions, a table, or the synthetic world. One clip at a time."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from videosparse.generation.errors import GenerationError
from videosparse.generation.sources import ModelSource
from videosparse.training.config import ConfigError

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
TABLES = ("metadata.jsonl", "metadata.csv")
_CHUNK = 1 << 20


class BrokenClip(ValueError):
    """A clip that cannot be used, and why; it is listed and skipped."""


@dataclass(frozen=True)
class Size:
    """What clips are cut to: pixel frames, height and width."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class ClipSource:
    """One clip that has not been read.

    Args:
        name: for messages and lists.
        caption: what it shows.
        video: file; None for the synthetic world.
        seed: of a synthetic scene.
    """

    name: str
    caption: str
    video: Path | None = None
    seed: int = 0

    def content(self) -> str:
        """Hash of what the clip is made from."""
        digest = hashlib.sha256(self.caption.encode())
        if self.video is None:
            digest.update(f"synthetic {self.seed}".encode())
        else:
            try:
                with self.video.open("rb") as file:
                    while part := file.read(_CHUNK):
                        digest.update(part)
            except OSError as error:
                raise BrokenClip(f"cannot be read: {error.strerror}") from error
        return digest.hexdigest()[:24]

    def read(self, size: Size, fps: float, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [3, F, H, W] in [0, 1], `fps` frames a second; a synthetic clip is rendered on `device`.

        Raises:
            BrokenClip: it cannot be decoded, or is too short.
        """
        if self.video is None:
            return _render(self.seed, size, fps, device)
        return _fit(_decode(self.video, size.frames, fps), size)


def find_clips(folder: Path) -> list[ClipSource]:
    """The clips of a folder: of its metadata.jsonl or metadata.csv (columns video and caption), else every video beside
    a `.txt` of the same name.

    Raises:
        ConfigError: no such folder, a table that lacks a column, or nothing found.
    """
    if not folder.is_dir():
        raise ConfigError(f"No folder of videos at {folder}; give one with videos and .txt captions.")
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    clips = list(_of_table(table)) if table else list(_beside_captions(folder))
    if not clips:
        raise ConfigError(
            f"{folder} has no video with a caption: expected {TABLES[0]}, {TABLES[1]}, or NAME.mp4 beside NAME.txt."
        )
    return clips


def synthetic_clips(count: int, seed: int = 0) -> list[ClipSource]:
    """Clips of the synthetic world's training split, with captions; the same numbers give the same clips."""
    from videosparse.synthetic.captions import caption

    clips = []
    for number in range(count):
        at = 1_000_003 * (seed + 1) + number
        rng = random.Random(at)
        clips.append(ClipSource(f"synthetic-{seed}-{number}", caption(_scene(rng), rng), seed=at))
    return clips


def _scene(rng: random.Random):  # type: ignore[no-untyped-def]  # scenes belong to videosparse.synthetic
    from videosparse.synthetic.scene import sample_scene

    return sample_scene(rng, split="train")


def _render(seed: int, size: Size, fps: float, device: torch.device | str) -> Tensor:
    from videosparse.synthetic.render import render

    scene = _scene(random.Random(seed))
    video = render([scene], size.frames, size.height, size.width, fps=fps, device=device)[0]
    return video.mul(255).round().clamp(0, 255).div(255)  # as in a file


def _of_table(table: Path) -> Iterator[ClipSource]:
    try:
        text = table.read_text(encoding="utf-8-sig")  # spreadsheets begin with a mark
        if table.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {table}: {error}.") from error
    for number, row in enumerate(rows, 1):
        video = row.get("video") or row.get("file_name") if isinstance(row, dict) else None
        caption = row.get("caption") or row.get("text") if isinstance(row, dict) else None
        if not isinstance(video, str) or not isinstance(caption, str):
            raise ConfigError(f"{table}, entry {number}: expected the columns video and caption (got {row!r}).")
        yield ClipSource(printable(video), printable(caption.strip()), table.parent / video)


def _beside_captions(folder: Path) -> Iterator[ClipSource]:
    for video in sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS):
        text = video.with_suffix(".txt")
        if text.is_file():
            caption = text.read_text(encoding="utf-8", errors="replace").strip()
            yield ClipSource(printable(str(video.relative_to(folder))), caption, video)


def printable(text: str) -> str:
    """Text that is UTF-8 for sure: names of files may have other bytes, which are written as in Python."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _decode(path: Path, frames: int, fps: float) -> Tensor:
    """The first frames of a file at a rate, uint8 [F, 3, H, W]: see `at_rate`."""
    import av

    found: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            for frame in at_rate(_timed(container), fps):
                found.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
                if len(found) == frames:
                    break
    except BrokenClip:
        raise
    except (OSError, ValueError, IndexError) as error:  # av.FFmpegError is one of the first two
        raise BrokenClip(f"cannot be decoded: {' '.join(str(error).split())}") from error
    if len(found) < frames:
        raise BrokenClip(f"has {len(found)} frames at {fps:g} a second, and {frames} are needed")
    if len({frame.shape for frame in found}) > 1:
        raise BrokenClip("changes its size")
    return torch.stack(found)


def at_rate(timed: Iterable[tuple[float, Any]], fps: float) -> Iterator[Any]:
    """Frames at a steady rate from frames with time stamps, whatever their own rate, which may vary.

    Frame i is the one whose time stamp is nearest to i / fps seconds after the first (ffmpeg's filter `fps` chooses so,
    too): faster videos lose frames, slower ones repeat some. It ends half a frame of `fps` after the last time stamp. A
    frame that is no later than the one before it is passed over.

    Args:
        timed: (seconds, frame) in the order of showing.
        fps: frames a second to give.
    """
    count = 0
    begin = last = 0.0
    before: Any = None
    for time, frame in timed:
        if before is None:
            begin = last = time
        elif time <= last:
            continue
        while count / fps <= time - begin:
            wanted = begin + count / fps
            # half way between two, where rounding would decide, it is the earlier one
            yield before if before is not None and wanted - last < time - wanted + 1e-6 else frame
            count += 1
        last, before = time, frame
    while before is not None and count / fps <= last - begin + 0.5 / fps:
        yield before
        count += 1


def _timed(container: Any) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of a file's first video; where frames have no time stamps, by the rate of the file."""
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    for number, frame in enumerate(container.decode(stream)):
        if frame.time is None and not rate:
            raise BrokenClip("has neither time stamps nor a frame rate")
        yield (number / float(rate) if frame.time is None else frame.time), frame


def _fit(frames: Tensor, size: Size) -> Tensor:
    """Scale so that the frame covers the size, and cut its centre; fp32 [3, F, H, W] in [0, 1]."""
    height, width = frames.shape[-2:]
    scale = max(size.height / height, size.width / width)
    if scale != 1:
        new = (max(size.height, round(height * scale)), max(size.width, round(width * scale)))
        # a few frames at a time: long videos are large in fp32
        parts = [F.interpolate(part.float(), new, mode="bilinear", antialias=True) for part in torch.split(frames, 8)]
        frames = torch.cat([part.round().clamp(0, 255).byte() for part in parts])
    top, left = (frames.shape[-2] - size.height) // 2, (frames.shape[-1] - size.width) // 2
    frames = frames[..., top : top + size.height, left : left + size.width]
    return frames.float().div(255).transpose(0, 1).contiguous()


def check_size(source: ModelSource, frames: int, height: int, width: int, names: tuple[str, str, str]) -> None:
    """Raise ConfigError for a size that the model cannot take, by the names under which the user gave its numbers.

    Args:
        source: the model.
        frames, height, width: in pixels.
        names: of the option or key of each; "" leaves the model's own word.
    """
    try:
        source.grid(frames, height, width)
    except GenerationError as error:
        told = str(error)
        for word, name in zip(("num_frames", "height", "width"), names, strict=True):
            if name and told.startswith(f"{word} "):
                told = name + told.removeprefix(word)
        raise ConfigError(told) from None


def nearest_size(clip: Tensor | tuple[int, int], sizes: list[Size]) -> Size:
    """The size whose shape is most like a video's height and width: the bucket that it goes to."""
    height, width = clip if isinstance(clip, tuple) else clip.shape[-2:]
    ratio = height / width
    return min(sizes, key=lambda size: abs(torch.log(torch.tensor(size.height / size.width / ratio)).item()))


def probe(path: Path) -> tuple[int, int]:
    """Height and width of a video.

    Raises:
        BrokenClip: it is no video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.height, stream.width
    except (OSError, ValueError, IndexError) as error:
        raise BrokenClip(f"is no video: {' '.join(str(error).split())}") from error
