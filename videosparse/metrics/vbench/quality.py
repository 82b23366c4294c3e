"""How good each frame looks: LAION's aesthetic score, and MUSIQ's score of noise, blur and exposure."""

from __future__ import annotations

import torch

from videosparse.metrics.vbench.dimension import SCALES, Context, Dimension, VideoScore
from videosparse.metrics.video import Video


@torch.inference_mode()
def aesthetic_quality(video: Video, context: Context) -> VideoScore:
    """A tenth of the mean score, from 1 to 10, that a linear head on CLIP L/14 gives.

    Raises:
        MissingError: the model or the head cannot be had.
    """
    head = context.models.load("laion-head")
    features = context.features("clip-l14", video).to(context.models.device)
    scores = head(features)[:, 0]
    return VideoScore(float(scores.double().mean()) / 10, len(scores))


def imaging_quality(video: Video, context: Context) -> VideoScore:
    """A hundredth of MUSIQ's mean score.

    Raises:
        MissingError: the model cannot be had.
    """
    scores = context.models.technical_quality(video)
    return VideoScore(sum(scores) / len(scores) / 100, len(scores))


AESTHETIC = Dimension(
    name="aesthetic_quality",
    models=("clip-l14", "laion-head"),
    kind="near",
    formula="mean of LAION's linear head on CLIP ViT-L/14 in fp32 (VBench: fp16 on a GPU), over 10",
    score=aesthetic_quality,
    scale=SCALES["aesthetic_quality"],
)

IMAGING = Dimension(
    name="imaging_quality",
    models=("musiq",),
    kind="exact",
    formula="mean of MUSIQ trained on SPAQ, long side at most 512, over 100",
    score=imaging_quality,
    scale=SCALES["imaging_quality"],
    told_times=100.0,
)
