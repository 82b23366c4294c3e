"""Does the video have the style that its prompt asks for?"""

from __future__ import annotations

from collections.abc import Mapping

from videosparse.metrics.vbench.dimension import SCALES, Context, Dimension, VideoScore
from videosparse.metrics.video import Video, VideoError


def appearance_style(video: Video, context: Context) -> VideoScore:
    """Mean cosine of CLIP B/32's features of frames and of the style's name.

    Raises:
        MissingError: the model cannot be had.
        VideoError: nothing says which style the video should have.
    """
    asked = context.auxiliary.get("appearance_style")
    asked = asked.get("appearance_style") if isinstance(asked, Mapping) else asked
    if not isinstance(asked, str) or not asked:
        raise VideoError(
            f"{video.name}: appearance_style needs a suite whose auxiliary_info names the style of this prompt."
        )
    cosines = context.features("clip-b32", video) @ context.models.text_feature(asked)
    return VideoScore(float(cosines.double().mean()), len(cosines))


STYLE = Dimension(
    name="appearance_style",
    models=("clip-b32",),
    kind="near",
    formula="mean cosine of CLIP ViT-B/32 features of frames and of the style that the suite names",
    score=appearance_style,
    scale=SCALES["appearance_style"],
    pooled="parts",
)
