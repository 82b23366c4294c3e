"""Video files: H.264 in mp4, 8 bits, every frame at the same time apart."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

DIVIDER = 8
"""Pixels of white between the two halves of a side-by-side video."""

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


def side_by_side(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two videos [frames, 3, height, width] in [0, 1] in one, with a white line between them.

    Raises:
        ValueError: their shapes differ.
    """
    if left.shape != right.shape:
        raise ValueError(
            f"Both videos must have one shape (got {list(left.shape)} and {list(right.shape)}); generate both with the "
            "same num_frames, height and width."
        )
    line = left.new_ones(*left.shape[:3], DIVIDER)
    return torch.cat((left, line, right.to(left)), dim=3)


def write_mp4(path: str | Path, video: torch.Tensor, fps: float) -> None:
    """Write [frames, 3, height, width] in [0, 1] as H.264, yuv420p, which every player shows.

    That format has only even sizes: an odd last row or column is repeated once. The same video gives the same bytes.

    Raises:
        ValueError: another shape.
        OSError: the file cannot be written.
    """
    import av

    frames = to_uint8(video).numpy()
    odd = [(0, size % 2) for size in frames.shape[1:3]]
    frames = np.pad(frames, ((0, 0), *odd, (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(65535), options=_X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def read_mp4(path: str | Path) -> torch.Tensor:
    """All frames of a video file, fp32 [frames, 3, height, width] in [0, 1].

    Raises:
        OSError: no such file, or no video.
    """
    import av

    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
