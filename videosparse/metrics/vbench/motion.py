"""How a video moves: flickering between frames, smoothness of motion, and whether anything moves at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from videosparse.metrics.vbench.dimension import SCALES, Context, Dimension, Scale, VideoScore
from videosparse.metrics.vbench.weights import MissingError
from videosparse.metrics.video import Video, VideoError
from videosparse.wording import install_extra

Image = npt.NDArray[Any]
Flow = npt.NDArray[Any]

_FLOW_LEAST = 16  # pixels a side that OpenCV's DIS needs
_FASTEST_SHARE = 0.05
_RATE = 8.0  # frames per second at which motion is looked for


def temporal_flickering(video: Video, context: Context) -> VideoScore:
    """(255 - mean absolute difference of adjacent frames) / 255."""
    levels = video.levels()
    # a pair at a time in int16: a long video would not fit otherwise
    pairs = [(b.short() - a.short()).abs().double().mean() for a, b in pairwise(levels)]
    return VideoScore(1 - float(torch.stack(pairs).mean()) / 255, len(pairs))


def motion_smoothness(video: Video, context: Context) -> VideoScore:
    """(255 - mean absolute error of odd frames made from their neighbours) / 255.

    Raises:
        VideoError: fewer than 3 frames, or frames below 16 pixels a side.
        MissingError: OpenCV is not installed.
    """
    if len(video) < 3:
        raise VideoError(f"{video.name}: motion_smoothness needs at least 3 frames (got {len(video)}).")
    flow = _dis(video)
    levels = video.levels().numpy()
    errors = []
    for at in range(1, len(video) - 1, 2):
        before, after = levels[at - 1], levels[at + 1]
        middle = middle_frame(before, after, flow(before, after), flow(after, before))
        errors.append(np.abs(middle - levels[at]).mean())
    return VideoScore(1 - float(np.mean(errors)) / 255, len(errors))


def middle_frame(before: Image, after: Image, forward: Flow, backward: Flow) -> Image:
    """The frame halfway between two, fp32 [height, width, 3] in levels.

    Flows from the middle are put together from those between the frames as in Super SloMo (Jiang et al. 2018, eq. 4),
    and the mean of both frames, each moved to the middle, is taken.

    Args:
        before, after: uint8 [height, width, 3].
        forward, backward: flow from `before` to `after` and back, pixels (x, y), [height, width, 2].
    """
    to_before = (backward - forward) / 4
    middle: Image = (_moved(before, to_before) + _moved(after, -to_before)) / 2
    return middle


def _moved(image: Image, flow: Flow) -> Image:
    """The image looked up where the flow points to."""
    import cv2

    rows, columns = np.indices(flow.shape[:2], dtype=np.float32)
    moved: Image = cv2.remap(
        image.astype(np.float32), columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    return moved


def is_dynamic(speeds: list[float], frames: int, fps: float, size: tuple[int, int]) -> bool:
    """Whether enough pairs of frames move fast enough.

    VBench's rule: more than 6 pixels at a shorter side of 256, more still below 8 frames a second, in at least
    round(4 / 16) of the frames. At least one pair has to; VBench calls any video of two frames dynamic.

    Args:
        speeds: of each pair, pixels, see `fastest`.
        frames: that were looked at.
        fps: of the video.
        size: height and width, pixels.
    """
    threshold = max(1.0, _RATE / fps) * 6.0 * min(size) / 256.0
    return sum(speed > threshold for speed in speeds) >= max(1, round(4 * frames / 16.0))


def fastest(flow: torch.Tensor | Flow) -> float:
    """Mean length of the fastest twentieth of a flow [height, width, 2], pixels."""
    lengths = torch.as_tensor(flow).float().norm(dim=-1).flatten()
    return float(lengths.topk(max(1, int(_FASTEST_SHARE * len(lengths)))).values.mean())


def _pairs(video: Video) -> Iterator[tuple[Image, Image]]:
    """Adjacent frames at about 8 a second, uint8."""
    levels = video.levels().numpy()[:: _stride(video)]
    yield from pairwise(levels)


def _stride(video: Video) -> int:
    return max(1, round(video.fps / _RATE))


def _dynamic(video: Video, flow: Callable[[Image, Image], torch.Tensor | Flow]) -> VideoScore:
    speeds = [fastest(flow(a, b)) for a, b in _pairs(video)]
    frames = math.ceil(len(video) / _stride(video))
    if not speeds:
        raise VideoError(f"{video.name}: {video.seconds:.2g} s are too short for dynamic_degree, which looks at 8 fps.")
    return VideoScore(float(is_dynamic(speeds, frames, video.fps, video.size)))


def _dynamic_raft(video: Video, context: Context) -> VideoScore:
    def flow(first: Image, second: Image) -> torch.Tensor:
        both = (torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in (first, second))
        return context.models.flow(*both)

    context.models.load("raft")
    try:
        return _dynamic(video, flow)
    except VideoError:
        raise
    except ValueError as error:
        raise VideoError(f"{video.name}: {error}") from error


def _dynamic_dis(video: Video, context: Context) -> VideoScore:
    return _dynamic(video, _dis(video))


def _dis(video: Video) -> Callable[[Image, Image], Flow]:
    """OpenCV's dense inverse search (Kroeger et al. 2016), which needs no weights, on grey frames."""
    try:
        import cv2
    except ImportError as error:
        raise MissingError(f"motion without weights needs OpenCV: {install_extra('eval')}.") from error
    if min(video.size) < _FLOW_LEAST:
        height, width = video.size
        raise VideoError(f"{video.name}: optical flow needs at least 16 pixels a side (got {height}x{width}).")
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(first: Image, second: Image) -> Flow:
        before, after = (cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY) for x in (first, second))
        found: Flow = search.calc(before, after, None)
        return found

    return flow


_DYNAMIC = (
    "share of videos where, at about 8 fps, the fastest 5 % of pixels move more than 6 * min(H, W) / 256 pixels in at "
    "least round(4 N / 16) pairs of frames; "
)

FLICKERING = Dimension(
    name="temporal_flickering",
    models=(),
    kind="exact",
    formula="(255 - mean absolute difference of adjacent frames) / 255; VBench scores only videos that a filter of its "
    "own finds static, here all that the suite names",
    score=temporal_flickering,
    scale=SCALES["temporal_flickering"],
)

SMOOTHNESS = Dimension(
    name="motion_smoothness",
    models=(),
    kind="proxy",
    formula="(255 - mean absolute error of odd frames interpolated from their neighbours) / 255, interpolated along "
    "DIS flow where VBench uses AMT-S, whose licence forbids commercial use",
    score=motion_smoothness,
    scale=SCALES["motion_smoothness"],
    packages=("cv2",),
)

DYNAMIC = Dimension(
    name="dynamic_degree",
    models=("raft",),
    kind="near",
    formula=_DYNAMIC + "torchvision's RAFT, trained on the same data as VBench's",
    score=_dynamic_raft,
    scale=SCALES["dynamic_degree"],
)

DYNAMIC_DIS = Dimension(
    name="dynamic_degree_dis",
    models=(),
    kind="proxy",
    formula=_DYNAMIC + "DIS flow, which needs no weights; not part of any total",
    score=_dynamic_dis,
    scale=Scale("extra"),
    packages=("cv2",),
    stands_for="dynamic_degree",
)
