"""Formulas on constructed videos: a still, a cut, a pan, a shake, noise; values worked out by hand."""

import json
import math
import random
from pathlib import Path

import footage
import pytest
import torch

from videosparse.metrics.vbench import DIMENSIONS, SCALES, WITHOUT_WEIGHTS, Context, VideoScore
from videosparse.metrics.vbench.consistency import consistency
from videosparse.metrics.vbench.motion import fastest, is_dynamic, middle_frame
from videosparse.metrics.video import VideoError, as_video
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import arrange_scene


def score(name, video, context=None):
    return DIMENSIONS[name].score(video, context or Context()).value


def test_flickering():
    assert score("temporal_flickering", footage.still()) == 1
    # one of seven pairs changes by all 255 levels
    assert score("temporal_flickering", footage.cut(8)) == pytest.approx(1 - 1 / 7)
    # half of all pixels change between any two frames of black and white by chance
    assert score("temporal_flickering", footage.noise()) == pytest.approx(0.5, abs=0.01)


def test_flickering_in_levels():
    dark, light = torch.full((1, 16, 16, 3), 10, dtype=torch.uint8), torch.full((1, 16, 16, 3), 61, dtype=torch.uint8)
    video = as_video(torch.cat([dark, light, dark]), 16)
    assert score("temporal_flickering", video) == pytest.approx(1 - 51 / 255)


def test_smoothness():
    assert score("motion_smoothness", footage.still()) == 1
    smooth, rough = footage.pan(2), footage.shake(8)
    assert score("motion_smoothness", smooth) > 0.99
    # neighbours of a shaken frame are equal, so that the frame between them is foretold to equal them, too
    assert score("motion_smoothness", rough) == pytest.approx(score("temporal_flickering", rough), abs=1e-3)
    # frames 0, 2, 4 of 5 are black and 1, 3 white: foretold black
    blinking = as_video(torch.tensor([0.0, 1, 0, 1, 0]).view(5, 1, 1, 1).expand(5, 3, 32, 32), 16)
    assert score("motion_smoothness", blinking) == pytest.approx(0, abs=1e-6)


def test_the_middle_of_a_known_motion():
    """Moved four pixels between the frames, the picture is moved by two in the middle; borders aside."""
    picture = (footage.texture(32, 64).permute(1, 2, 0) * 255).byte().numpy()
    before, middle, after = picture[:, 4:52], picture[:, 6:54], picture[:, 8:56]
    flow = torch.zeros(32, 48, 2)
    flow[..., 0] = -4  # what is at x comes to x - 4
    made = middle_frame(before, after, flow.numpy(), -flow.numpy())
    assert abs(made - middle)[:, 8:-8].max() < 0.01


def test_dynamic_degree_without_weights():
    assert score("dynamic_degree_dis", footage.still(17)) == 0
    assert score("dynamic_degree_dis", footage.pan(2)) == 1  # 4 pixels in a pair of 8 fps; 1.5 are asked for
    # at 8 fps every second frame is left out, and a shake of one frame each cannot be seen
    assert score("dynamic_degree_dis", footage.shake(8)) == 0
    assert score("dynamic_degree_dis", footage.shake(8, fps=8)) == 1


def test_the_rule_of_dynamic_degree():
    # 16 frames, side 256: 4 pairs above 6 pixels are enough, 3 are not
    assert is_dynamic([6.1] * 4 + [0] * 11, 16, 8, (256, 400))
    assert not is_dynamic([6.1] * 3 + [6.0] * 12, 16, 8, (256, 400))
    # half the side, half the threshold; at 4 fps twice as much motion is asked for
    assert is_dynamic([3.1] * 4, 16, 8, (128, 400))
    assert is_dynamic([6.1] * 4, 16, 4, (128, 400))
    assert not is_dynamic([5.9] * 4, 16, 4, (128, 400))
    # two frames: round(0.5) is 0, and no motion at all would be enough
    assert not is_dynamic([0.0], 2, 8, (256, 256))


def test_the_fastest_twentieth():
    flow = torch.zeros(10, 10, 2)
    flow[0, :5] = torch.tensor([3.0, 4.0])  # 5 pixels long, 5 of 100
    assert fastest(flow) == pytest.approx(5)
    flow[1] = torch.tensor([0.0, 100.0])  # ten more are faster
    assert fastest(flow) == pytest.approx(100)


def test_consistency():
    a, b = torch.eye(2)
    assert consistency(torch.stack([a, a, a])) == VideoScore(1, 2)
    # A A B B: like both, like none, like the one before only
    assert consistency(torch.stack([a, a, b, b])).value == pytest.approx((1 + 0 + 0.5) / 3)
    # against the first 60 degrees, against the one before 60, then 120 (counts as 0) and 60
    turn = [torch.tensor([math.cos(x), math.sin(x)]) for x in (0, math.pi / 3, 2 * math.pi / 3)]
    assert consistency(torch.stack(turn)).value == pytest.approx(((0.5 + 0.5) / 2 + (0.5 + 0) / 2) / 2)


@pytest.mark.parametrize(("name", "key"), [("subject_consistency", "dino"), ("background_consistency", "clip-b32")])
def test_learned_consistency(models, name, key):
    context = Context(models)
    assert score(name, footage.still(), context) == pytest.approx(1, abs=1e-5)
    video = footage.cut(8)
    features = models.features(key, video)
    # pairs 1 to 3 and 5 to 7 are of equal frames; only black against white is less than 1
    across = max(0.0, float(features[0] @ features[-1]))
    expected = (3 + across + 3 * (1 + across) / 2) / 7
    assert score(name, video, Context(models)) == pytest.approx(expected, abs=1e-5)
    assert across < 0.999, "the random model must tell black from white for this to mean something"


def test_aesthetic_quality_is_the_head_on_features(models):
    video = footage.cut(4)
    head = models.load("laion-head")
    expected = float((models.features("clip-l14", video) @ head.weight[0] + head.bias).mean()) / 10
    assert score("aesthetic_quality", video, Context(models)) == pytest.approx(expected, abs=1e-6)


def test_appearance_style(models):
    video = footage.cut(4)
    context = Context(models, auxiliary={"appearance_style": {"appearance_style": "oil painting"}})
    expected = float((models.features("clip-b32", video) @ models.text_feature("oil painting")).mean())
    assert score("appearance_style", video, context) == pytest.approx(expected, abs=1e-6)
    assert not torch.allclose(models.text_feature("oil painting"), models.text_feature("black white"))
    with pytest.raises(VideoError, match="needs a suite whose auxiliary_info names the style"):
        score("appearance_style", video, Context(models))


@pytest.mark.parametrize(
    ("name", "video", "message"),
    [
        ("motion_smoothness", footage.still(2), "at least 3 frames"),
        ("motion_smoothness", footage.still(4, size=8), "at least 16 pixels a side"),
        ("dynamic_degree_dis", footage.still(3, fps=60), "too short for dynamic_degree"),
    ],
)
def test_videos_that_a_dimension_cannot_take(name, video, message):
    with pytest.raises(VideoError, match=message):
        score(name, video)


def test_ranges_and_weights_are_those_of_vbench():
    quality = [d for d in DIMENSIONS.values() if d.group == "quality"]
    assert len(quality) == 7
    assert sum(d.weight for d in quality) == 6.5
    assert sum(scale.group == "semantic" for scale in SCALES.values()) == 9
    smooth = DIMENSIONS["motion_smoothness"]
    assert (smooth.minimum, smooth.maximum, smooth.kind) == (0.706, 0.9975, "proxy")
    assert smooth.scale.normalised(0.85175) == pytest.approx(0.5)
    assert [smooth.scale.normalised(x) for x in (0.5, 1.0)] == [0, 1]
    assert {"temporal_flickering", "motion_smoothness"} <= set(WITHOUT_WEIGHTS)


def test_pooling():
    subject, flicker = DIMENSIONS["subject_consistency"], DIMENSIONS["temporal_flickering"]
    scores = [VideoScore(1.0, 10), VideoScore(0.0, 30)]
    assert subject.pool(scores) == pytest.approx(0.25)  # over pairs, as VBench pools what it averages over frames
    assert flicker.pool(scores) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def worlds():
    """Rendered truth of eight prompts, and whether anything moves in it."""
    prompts = json.loads((Path(__file__).parents[3] / "eval" / "prompts" / "world64.json").read_text())["prompts"][:8]
    listed = [tuple((o["shape"], o["colour"], o["motion"]) for o in p["objects"]) for p in prompts]
    scenes = [arrange_scene(random.Random(p["seed"]), o, p["background"]) for p, o in zip(prompts, listed, strict=True)]
    moving = [p["background"] == "stripes" or any(o["motion"] != "static" for o in p["objects"]) for p in prompts]
    return render(scenes, 33, 128, 128).transpose(1, 2), moving


@pytest.mark.parametrize("damage", ["noise", "flicker", "repeats", "shuffled"])
def test_the_proxy_of_smoothness_falls_with_every_damage(worlds, damage):
    generator = torch.Generator().manual_seed(0)
    truth = worlds[0]
    damaged = {
        "noise": lambda: truth + 0.02 * torch.randn(truth.shape, generator=generator),
        "flicker": lambda: truth * (1 + 0.1 * torch.randn(1, 33, 1, 1, 1, generator=generator)),
        "repeats": lambda: truth[:, [t - 1 if t and t % 4 == 0 else t for t in range(33)]],
        "shuffled": lambda: truth[:, torch.randperm(33, generator=generator)],
    }[damage]().clamp(0, 1)
    means = [sum(score("motion_smoothness", as_video(v, 16)) for v in videos) / 8 for videos in (truth, damaged)]
    assert means[0] > 0.995
    assert means[1] < means[0] - 0.002


def test_what_moves_is_found_without_weights(worlds):
    videos, moving = worlds
    assert [score("dynamic_degree_dis", as_video(v, 16)) for v in videos] == [float(m) for m in moving]
