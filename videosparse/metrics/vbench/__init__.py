"""VBench's dimensions that maintained models compute faithfully, each marked exact, near or proxy.

Why not the package `vbench`: it pins numpy < 2, transformers 4.33 and a detectron2 from git.

    from videosparse.metrics.vbench import DIMENSIONS, Context
    from videosparse.metrics.video import as_video

    score = DIMENSIONS["temporal_flickering"].score(as_video(frames, fps=16), Context())

`suite.score_folder` scores a folder, `python eval/score_videos.py FOLDER` does so from a shell.
"""

from videosparse.metrics.vbench.consistency import BACKGROUND, SUBJECT
from videosparse.metrics.vbench.dimension import SCALES, Context, Dimension, VideoScore
from videosparse.metrics.vbench.models import Models
from videosparse.metrics.vbench.motion import DYNAMIC, DYNAMIC_DIS, FLICKERING, SMOOTHNESS
from videosparse.metrics.vbench.quality import AESTHETIC, IMAGING
from videosparse.metrics.vbench.style import STYLE
from videosparse.metrics.vbench.weights import MissingError, Weights

DIMENSIONS: dict[str, Dimension] = {
    dimension.name: dimension
    for dimension in (
        SUBJECT, BACKGROUND, FLICKERING, SMOOTHNESS, DYNAMIC, AESTHETIC, IMAGING, STYLE, DYNAMIC_DIS,
    )
}  # fmt: skip
"""By name, in the order of tables."""

WITHOUT_WEIGHTS = tuple(name for name, dimension in DIMENSIONS.items() if not dimension.models)
"""Dimensions that need no download."""

__all__ = [
    "DIMENSIONS",
    "SCALES",
    "WITHOUT_WEIGHTS",
    "Context",
    "Dimension",
    "MissingError",
    "Models",
    "VideoScore",
    "Weights",
]
