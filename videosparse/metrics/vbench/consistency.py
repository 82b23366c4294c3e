"""Does the video stay what it began as? Subject and background consistency: features of frames against one another."""

from __future__ import annotations

import torch

from videosparse.metrics.vbench.dimension import SCALES, Context, Dimension, VideoScore
from videosparse.metrics.video import Video

_FORMULA = "mean over t >= 1 of (max(0, cos(f_t, f_t-1)) + max(0, cos(f_t, f_0))) / 2, f = "


def consistency(features: torch.Tensor) -> VideoScore:
    """How alike frames are to the one before and to the first.

    Args:
        features: of length 1, [frames, width], at least two.
    """
    before = (features[1:] * features[:-1]).sum(dim=-1).clamp(min=0)
    first = (features[1:] * features[:1]).sum(dim=-1).clamp(min=0)
    return VideoScore(float((before + first).double().mean() / 2), len(features) - 1)


def _subject(video: Video, context: Context) -> VideoScore:
    return consistency(context.features("dino", video))


def _background(video: Video, context: Context) -> VideoScore:
    return consistency(context.features("clip-b32", video))


SUBJECT = Dimension(
    name="subject_consistency",
    models=("dino",),
    kind="near",
    formula=_FORMULA + "class token of DINO ViT-B/16, shorter side 224, bilinear, no crop",
    score=_subject,
    scale=SCALES["subject_consistency"],
    pooled="parts",
)

BACKGROUND = Dimension(
    name="background_consistency",
    models=("clip-b32",),
    kind="near",
    formula=_FORMULA + "image feature of CLIP ViT-B/32 in fp32 (VBench: fp16 on a GPU), 224, bicubic, centre",
    score=_background,
    scale=SCALES["background_consistency"],
    pooled="parts",
)
