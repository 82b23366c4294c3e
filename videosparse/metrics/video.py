"""A video that is to be judged: its frames, its rate and its name, checked once; and the files it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
"""Of files that are decoded."""

RAW_ENDING = ".safetensors"
"""Of files that hold the frames as a model gave them; see `save_raw`."""

BESIDE = ("-dense", "-compare")
"""What `--compare` adds to a video's name for the dense one, and for both side by side."""


class VideoError(ValueError):
    """A video that cannot be judged; the message names it and says why in one line."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames in the order of time.

    Args:
        frames: [frames, height, width, 3], uint8, or floating in [0, 1].
        fps: frames per second.
        name: of the file or whatever else a message should say.

    Raises:
        VideoError: another shape or type, fewer than 2 frames, values that are no numbers or outside [0, 1], a rate
            that is not positive.
    """

    frames: torch.Tensor
    fps: float
    name: str = "video"

    def __post_init__(self) -> None:
        shape = list(self.frames.shape)
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
            raise VideoError(f"{self.name}: a video must be [frames, height, width, 3], none 0 (got {shape}).")
        if shape[0] < 2:
            raise VideoError(f"{self.name}: has {shape[0]} frame(s); at least 2 are needed.")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise VideoError(f"{self.name}: the frame rate must be positive (got {self.fps}).")
        if self.frames.dtype != torch.uint8:
            self._check_floating()

    def _check_floating(self) -> None:
        if not self.frames.is_floating_point():
            raise VideoError(f"{self.name}: must be uint8, or floating in [0, 1] (got {self.frames.dtype}).")
        for index, frame in enumerate(self.frames):
            if not bool(frame.isfinite().all()):
                raise VideoError(f"{self.name}: frame {index} holds NaN or infinite values.")
            low, high = (float(x) for x in frame.aminmax())
            if low < 0 or high > 1:
                raise VideoError(
                    f"{self.name}: frame {index} must lie in [0, 1] (got {low:.3g} to {high:.3g}); "
                    "divide levels by 255."
                )

    def __len__(self) -> int:
        return self.frames.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.frames.shape[1], self.frames.shape[2]

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return len(self) / self.fps

    def levels(self) -> torch.Tensor:
        """uint8 [frames, height, width, 3]: what an 8-bit file holds."""
        if self.frames.dtype == torch.uint8:
            return self.frames
        return (self.frames.float() * 255).round_().to(torch.uint8)

    def unit(self) -> torch.Tensor:
        """fp32 [frames, 3, height, width] in [0, 1], not rounded to levels unless the frames are."""
        frames = self.frames.permute(0, 3, 1, 2)
        return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()

    def part(self, start: int, stop: int) -> Video:
        """Frames `start` to `stop`, without a copy."""
        return Video(self.frames[start:stop], self.fps, f"{self.name} [{start}:{stop}]")


def as_video(tensor: torch.Tensor, fps: float, name: str = "video") -> Video:
    """A video from a tensor, channels first (as pipelines return them with output_type="pt") or last.

    Args:
        tensor: [frames, 3, height, width] or [frames, height, width, 3], uint8, or floating in [0, 1].
        fps: frames per second.
        name: for messages.

    Raises:
        VideoError: see `Video`.
    """
    tensor = tensor.detach().cpu()
    if tensor.dim() == 4 and tensor.shape[-1] != 3 and tensor.shape[1] == 3:
        tensor = tensor.permute(0, 2, 3, 1)
    return Video(tensor, fps, name)


def read_video(path: Path) -> Video:
    """All frames of a file, decoded (uint8) or raw (as `save_raw` wrote them).

    Raises:
        VideoError: the file cannot be read, holds no video or no frame rate, or its frames change their size; see
            `Video`, too.
    """
    return _read_raw(path) if path.suffix == RAW_ENDING else _decode(path)


def save_raw(path: Path, video: Video, latents: torch.Tensor | None = None) -> None:
    """Write the frames as they are, so that they can be compared without a codec in between.

    Args:
        path: of the file, which ends in `RAW_ENDING`.
        video: to write.
        latents: that it was decoded from, [channels, frames, height, width]; None leaves them out.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    tensors = {"video": video.frames} | ({} if latents is None else {"latents": latents.detach().cpu()})
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, part, metadata={"fps": repr(float(video.fps))})
    part.replace(path)


def read_latents(path: Path) -> torch.Tensor | None:
    """The latents in a file of raw frames, or of latents alone; None where it has none.

    Raises:
        VideoError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            found: torch.Tensor | None = file.get_tensor("latents") if "latents" in file.keys() else None  # noqa: SIM118
            return found
    except (SafetensorError, OSError) as error:
        raise VideoError(f"{path.name}: is no file of raw frames ({' '.join(str(error).split())}).") from error


def find_videos(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of every video in a folder by its stem, in order: "decoded", "raw" or both, and "latents".

    A file of latents alone, as `videosparse generate --save-latents` writes it, goes with the video beside it; files of
    other tensors, such as LoRAs, are left out; so is what `--compare` shows of two videos side by side.

    Raises:
        VideoError: it is no folder, it has no videos, two decoded files share a stem, or a name is no UTF-8.
    """
    if not folder.is_dir():
        what = "is a file; expected a folder" if folder.is_file() else "no such folder; give one"
        raise VideoError(f"{folder}: {what} that holds videos ({', '.join(ENDINGS)}).")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        kind = _kind(path) if path.suffix == RAW_ENDING else "decoded" if path.suffix.lower() in ENDINGS else ""
        if not kind:
            continue
        readable = path.name.encode("utf-8", errors="backslashreplace").decode("utf-8")
        if readable != path.name:
            raise VideoError(f"{readable} in {folder}: its name is no UTF-8, which tables of scores are; rename it.")
        files = found.setdefault(path.stem, {})
        if kind in files:
            raise VideoError(f"{path} and {files[kind].name} are of one name; keep one of them.")
        files[kind] = path
    dense, both = BESIDE
    shown = {stem + both for stem in found if stem + dense in found}
    found = {stem: files for stem, files in found.items() if files.keys() != {"latents"} and stem not in shown}
    if not found:
        raise VideoError(f"{folder}: holds no videos ({', '.join(ENDINGS)}, or raw frames as {RAW_ENDING}).")
    return found


def _kind(path: Path) -> str:
    """What a file of tensors is: "raw", "latents" or neither; a damaged one is raw, and told of when it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return "raw"
    return next((kind for kind, name in (("raw", "video"), ("latents", "latents")) if name in names), "")


def probe_size(path: Path) -> tuple[int, int] | None:
    """Height and width that a file's header says; None where it cannot be read."""
    if path.suffix == RAW_ENDING:
        return _raw_size(path)
    import av

    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            return (stream.height, stream.width) if stream.height and stream.width else None
    except (av.FFmpegError, OSError, IndexError):
        return None


def _raw_size(path: Path) -> tuple[int, int] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            shape = file.get_slice("video").get_shape()
    except (SafetensorError, OSError):
        return None
    return (shape[1], shape[2]) if len(shape) == 4 else None


def _decode(path: Path) -> Video:
    import av

    name = path.name
    try:
        if path.is_file() and not path.stat().st_size:
            raise VideoError(f"{name}: is empty; it has no bytes.")
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise VideoError(f"{name}: has no video stream.")
            stream = file.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    except av.EOFError:  # nothing but a header
        frames, rate = [], None
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoError(f"{name}: cannot be read ({reason}).") from error
    if not frames:
        raise VideoError(f"{name}: is empty; it has no frames.")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        told = " and ".join(f"{h}x{w}" for h, w, _ in sorted(sizes))
        raise VideoError(f"{name}: its frames have mixed sizes ({told}).")
    if not rate:
        raise VideoError(f"{name}: tells no frame rate.")
    return Video(torch.from_numpy(np.stack(frames)), float(rate), name)


def _read_raw(path: Path) -> Video:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            frames = file.get_tensor("video")
    except (SafetensorError, OSError) as error:
        raise VideoError(f"{path.name}: is no file of raw frames ({' '.join(str(error).split())}).") from error
    try:
        fps = float(metadata["fps"])
    except (KeyError, ValueError) as error:
        raise VideoError(f"{path.name}: its metadata tell no frame rate; write it with `save_raw`.") from error
    return Video(frames, fps, path.name)
