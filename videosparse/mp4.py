"""Video files: H.264 in mp4, 8 bits, every frame at the same time apart."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Visually lossless. x264's macroblock tree is off because it reads memory that nobody wrote at some sizes (seen at
# 64x64 and 264x128), so that the same frames gave different files.
_X264 = {"crf": "16", "x264-params": "mbtree=0"}


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """uint8 [frames, height, width, 3] on the CPU from floating [frames, 3, height, width] in [0, 1].

    Raises:
        ValueError: another shape.
    """
    if video.dim() != 4 or video.shape[1] != 3:
        raise ValueError(
            f"A video must be [frames, 3, height, width] (got {list(video.shape)}); a pipeline called with "
            'output_type="pt" returns it so, .frames[0].'
        )
    levels = (video.detach().float().clamp(0, 1) * 255).round_().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu()


class Mp4Writer:
    """Writes frames as H.264, yuv420p, which every player shows, as they come; a context manager.

    That format has only even sizes: an odd last row or column is repeated once. The same video gives the same bytes,
    however it is cut into parts. The file can be played once the block has ended.

    Args:
        path: of the file.
        fps: frames a second.

    Raises:
        ValueError: frames of another shape, or of another size than the first; at the end, none.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self._path, self._rate = path, Fraction(fps).limit_denominator(65535)
        self._file: Any = None
        self._stream: Any = None
        self._size: tuple[int, int] | None = None
        self.frames = 0

    def add(self, video: torch.Tensor) -> None:
        """Write frames [frames, 3, height, width] in [0, 1]."""
        import av

        frames = to_uint8(video).numpy()
        size = frames.shape[1:3]
        if self._size is not None and size != self._size:  # the encoder would squeeze them
            got, first = ("x".join(map(str, sides)) for sides in (size, self._size))
            raise ValueError(f"All frames of a file must have one size (got {got} after {first}); use a file for each.")
        self._size = size
        odd = [(0, size % 2) for size in frames.shape[1:3]]
        frames = np.pad(frames, ((0, 0), *odd, (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._file.add_stream("libx264", rate=self._rate, options=_X264)
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        for frame in frames:
            self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self.frames += len(frames)

    def __enter__(self) -> Mp4Writer:
        import av

        self._file = av.open(str(self._path), "w", format="mp4")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None and self._stream is not None:
            self._file.mux(self._stream.encode())
        self._file.close()
        if kind is None and not self.frames:
            raise ValueError("There is no frame to write: generate a video inside the block.")


def write_mp4(path: str | Path, video: torch.Tensor, fps: float) -> None:
    """Write [frames, 3, height, width] in [0, 1] as a file; see `Mp4Writer`.

    Raises:
        ValueError: another shape.
        OSError: the file cannot be written.
    """
    with Mp4Writer(path, fps) as file:
        file.add(video)


def read_mp4(path: str | Path) -> torch.Tensor:
    """All frames of a video file, fp32 [frames, 3, height, width] in [0, 1].

    Raises:
        OSError: no such file, or no video.
    """
    import av

    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255


def decode_again(video: torch.Tensor, fps: float) -> torch.Tensor:
    """A video [frames, 3, height, width] in [0, 1] after H.264, as `write_mp4` writes it.

    Papers that score decoded files see their codec's loss, too. Odd sizes come back without the repeated row.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, video, fps)
        return read_mp4(path)[..., : video.shape[-2], : video.shape[-1]]
