"""How often the detectors of the synthetic world are right, on scenes whose truth is known."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from videosparse.metrics import quarters
from videosparse.metrics.world import analyse, centre_error, score
from videosparse.synthetic.captions import Expected, ExpectedObject
from videosparse.synthetic.render import render, states
from videosparse.synthetic.scene import Scene, sample_scene

QUESTIONS = (*quarters.QUESTIONS, "all_right")
"""Attributes of a `Score` that say whether something is right."""


def degrade(video: Tensor, *, blur: float = 0.7, noise: float = 0.02, seed: int = 0) -> Tensor:
    """Blur and noise of about 32 dB, as a small VAE adds. ``video`` is [3, F, H, W]; ``blur`` is in pixels."""
    taps = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * blur**2))
    kernel = taps / taps.sum()
    x = video.flatten(0, 1)[:, None]
    x = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")
    x = torch.nn.functional.conv2d(x, kernel.reshape(1, 1, 1, 7))
    x = torch.nn.functional.conv2d(x, kernel.reshape(1, 1, 7, 1)).reshape(video.shape)
    return (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def check_scene(seed: int, *, objects: int, rough: bool, frames: int, size: int) -> dict[str, float]:
    """Render one scene without occluder, look at it, and say what was found right.

    Permanence is right if every object was seen in as many frames as it is visible, give or take two.
    """
    torch.set_num_threads(1)
    rng = random.Random(seed)
    drawn = sample_scene(rng, split="any", objects=objects)
    scene = Scene(drawn.objects, drawn.background)
    start = rng.uniform(0, 20)
    video = render([scene], frames, size, size, start=start)[0]
    truth = states(scene, frames, start=start)
    result = score(analyse(degrade(video, seed=seed) if rough else video), expected_of(scene), frames=frames)
    answers = {question: float(bool(getattr(result, question))) for question in QUESTIONS}
    errors = [centre_error(d, truth, i) for i, d in enumerate(result.detected) if d]
    visible = [float(np.mean([frame[i].visible for frame in truth])) for i in range(objects)]
    alive = [d.alive if d else 0.0 for d in result.detected]
    answers["permanence"] = float(all(abs(a - v) <= 2.01 / frames for a, v in zip(alive, visible, strict=True)))
    answers["no switch"] = float(result.switches == 0)
    return answers | {"centre error, pixels": float(np.mean(errors)) * size if errors else math.nan}


def expected_of(scene: Scene) -> Expected:
    """All that a scene shows, as if its caption said it."""
    objects = tuple(ExpectedObject(o.shape, o.colour, o.motion) for o in scene.objects)
    return Expected(objects, scene.background.kind)
