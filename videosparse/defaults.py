"""What methods take where the user says nothing: Radial Attention's settings by model, and blocks by size of frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from videosparse.cases import ModelSpec
from videosparse.layout import VideoGrid
from videosparse.models import model_variant

SMALL_FRAME = 512
"""Below this many tokens a frame, a block of 128 holds so many rows of the picture that a map of them says little."""


def block_for(usual: tuple[int, int], grid: VideoGrid | None) -> tuple[int, int]:
    """The block (query rows, key rows) that every method defaults to: `usual`, and 64x64 where frames are small.

    Args:
        usual: of the method or model.
        grid: of the video, None while it is unknown.
    """
    return usual if grid is None or grid.frame_tokens >= SMALL_FRAME else (64, 64)


@dataclass(frozen=True)
class RadialDefaults:
    """Radial Attention's settings for a model; see `RadialPolicy` and `DenseSchedule` for the fields."""

    decay: float
    sink: bool
    first_steps: float
    first_layers: int
    block: tuple[int, int] = (128, 64)


# As published with the method (arXiv 2506.19852 and its code): 12 of 50 steps is 0.24, 11 of 40 is 0.275. Of the rest,
# TI2V-5B takes after its sibling A14B, and Mochi after HunyuanVideo, with which it shares the joint sequence. The
# authors publish blocks of 128x128, and 64x64 for Wan 2.2. Blocks of 128x64 keep every pair of tokens inside the bands
# as those do, with 3 to 10 % fewer blocks than 128x128 at the same rate; of 64x64, Hopper's kernel takes none.
_RADIAL: dict[str, RadialDefaults] = {
    "wan2.1": RadialDefaults(decay=0.2, sink=True, first_steps=0.24, first_layers=1),
    "wan2.2-a14b": RadialDefaults(decay=0.8, sink=True, first_steps=0.275, first_layers=1),
    "wan2.2-5b": RadialDefaults(decay=0.8, sink=True, first_steps=0.275, first_layers=1),
    "hunyuan-video": RadialDefaults(decay=0.95, sink=False, first_steps=0.24, first_layers=0),
    "mochi": RadialDefaults(decay=0.95, sink=False, first_steps=0.24, first_layers=0),
}


def radial_defaults(
    model: ModelSpec | Mapping[str, Any], *, experts: int = 1, grid: VideoGrid | None = None
) -> RadialDefaults:
    """The settings of Radial Attention that suit a model; the arguments are those of `Processor.resolve`.

    Raises:
        ValueError: the configuration is of an unknown transformer.
    """
    found = _RADIAL[model_variant(model, experts=experts)]
    return replace(found, block=block_for(found.block, grid))
