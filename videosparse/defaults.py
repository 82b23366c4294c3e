"""What methods take where the user says nothing: Radial Attention's settings by model, and blocks by size of frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from videosparse.cases import ModelSpec
from videosparse.layout import VideoGrid
from videosparse.models import model_variant
from videosparse.policies.base import BLOCK

SMALL_FRAME = 512
"""Below this many tokens a frame, a block of 128 holds so many rows of the picture that a map of them says little."""

SMALL_BLOCK = (64, 64)


def block_for(grid: VideoGrid | None) -> tuple[int, int]:
    """The block (query rows, key rows) that every method defaults to: `BLOCK`, and 64x64 where frames are small.

    Args:
        grid: of the video, None while it is unknown.
    """
    return BLOCK if grid is None or grid.frame_tokens >= SMALL_FRAME else SMALL_BLOCK


@dataclass(frozen=True)
class RadialDefaults:
    """Radial Attention's settings for a model; see `RadialPolicy` and `DenseSchedule` for the fields."""

    decay: float
    sink: bool
    first_steps: float
    first_layers: int


# As published with the method (arXiv 2506.19852 and its code): 12 of 50 steps is 0.24, 11 of 40 is 0.275. Of the rest,
# TI2V-5B takes after its sibling A14B, and Mochi after HunyuanVideo, with which it shares the joint sequence.
_RADIAL: dict[str, RadialDefaults] = {
    "wan2.1": RadialDefaults(decay=0.2, sink=True, first_steps=0.24, first_layers=1),
    "wan2.2-a14b": RadialDefaults(decay=0.8, sink=True, first_steps=0.275, first_layers=1),
    "wan2.2-5b": RadialDefaults(decay=0.8, sink=True, first_steps=0.275, first_layers=1),
    "hunyuan-video": RadialDefaults(decay=0.95, sink=False, first_steps=0.24, first_layers=0),
    "mochi": RadialDefaults(decay=0.95, sink=False, first_steps=0.24, first_layers=0),
}


def radial_defaults(model: ModelSpec | Mapping[str, Any], *, experts: int = 1) -> RadialDefaults:
    """The settings of Radial Attention that suit a model; the arguments are those of `Processor.resolve`.

    Raises:
        ValueError: the configuration is of an unknown transformer.
    """
    return _RADIAL[model_variant(model, experts=experts)]
