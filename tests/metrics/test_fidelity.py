"""PSNR and SSIM against formulas and torchmetrics, and their convention."""

import json
import math

import pytest
import torch

from videosparse.metrics.fidelity import (
    CONVENTION,
    CONVENTIONS,
    fidelity,
    psnr,
    quarter_means,
    relative_l1,
    ssim,
)
from videosparse.mp4 import decode_again


@pytest.fixture
def videos():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 3, 24, 31, generator=generator)
    return (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1), clean


def test_psnr_of_a_known_error():
    reference = torch.full((2, 3, 8, 8), 0.5)
    assert psnr(reference + 0.1, reference).tolist() == pytest.approx([20.0, 20.0], abs=1e-5)


def test_equal_videos_have_infinite_psnr_and_ssim_one():
    video = torch.rand(2, 3, 16, 16)
    rows = {row.metric: row for row in fidelity(video, video)}
    assert rows["psnr"].value == math.inf
    assert rows["ssim"].value == pytest.approx(1)


def test_both_equal_torchmetrics(videos):
    image = pytest.importorskip("torchmetrics.functional.image")
    noisy, clean = videos
    for i, (p, s) in enumerate(zip(psnr(noisy, clean), ssim(noisy, clean), strict=True)):
        a, b = noisy[i : i + 1].double(), clean[i : i + 1].double()
        assert float(p) == pytest.approx(float(image.peak_signal_noise_ratio(a, b, data_range=1.0)), rel=1e-6)
        theirs = image.structural_similarity_index_measure(a, b, data_range=1.0, gaussian_kernel=True, sigma=1.5)
        assert float(s) == pytest.approx(float(theirs), abs=1e-6)


def test_ssim_of_flat_frames_is_the_luminance_term():
    a, b = torch.full((1, 3, 12, 12), 0.2), torch.full((1, 3, 12, 12), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-6)


def test_a_value_is_the_mean_over_frames_and_names_its_convention(videos):
    for row in fidelity(*videos):
        assert row.convention == CONVENTION == "videosparse"
        assert len(row.per_frame) == 3
        assert row.value == pytest.approx(sum(row.per_frame) / 3)
        assert row.worst == min(row.per_frame)


def test_rows_are_strict_json_even_when_infinite():
    video = torch.rand(2, 3, 16, 16)
    text = json.dumps([row.as_json() for row in fidelity(video, video)], allow_nan=False)
    assert json.loads(text)[0] == {
        "metric": "psnr",
        "convention": "videosparse",
        "value": None,
        "worst": None,
        "per_quarter": [None, None, None, None],
        "per_frame": [None, None],
    }


def test_half_precision_is_scored_in_fp64(videos):
    noisy, clean = (v.bfloat16() for v in videos)
    assert torch.equal(psnr(noisy, clean), psnr(noisy.double(), clean.double()))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.rand(2, 3, 16, 16), torch.rand(3, 3, 16, 16), ValueError, "one shape"),
        (torch.rand(3, 16, 16), torch.rand(3, 16, 16), ValueError, "frames, channels, height, width"),
        (torch.rand(0, 3, 16, 16), torch.rand(0, 3, 16, 16), ValueError, "none 0"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8),) * 2 + (TypeError, "divide uint8 by 255"),
        (torch.full((1, 3, 16, 16), 2.0), torch.zeros(1, 3, 16, 16), ValueError, r"lie in \[0, 1\]"),
        (torch.full((1, 3, 16, 16), float("nan")), torch.zeros(1, 3, 16, 16), ValueError, r"lie in \[0, 1\]"),
        (torch.zeros(1, 3, 5, 16), torch.zeros(1, 3, 5, 16), ValueError, "at least 6 x 6"),
    ],
)
def test_errors(a, b, error, message):
    with pytest.raises(error, match=message):
        fidelity(a, b)


def test_sparse_videogens_window_is_uniform(videos):
    image = pytest.importorskip("torchmetrics.functional.image")
    noisy, clean = (v.double() for v in videos)
    for i, value in enumerate(ssim(noisy, clean, "svg")):
        theirs = image.structural_similarity_index_measure(
            noisy[i : i + 1], clean[i : i + 1], data_range=1.0, gaussian_kernel=False, kernel_size=11
        )
        assert float(value) == pytest.approx(float(theirs), abs=1e-6)


def test_fastvideos_window_sees_zeros_beyond_the_borders(videos):
    noisy, clean = videos
    ours, theirs = ssim(noisy, clean), ssim(noisy, clean, "fastvideo")
    assert not torch.allclose(ours, theirs, atol=1e-4)
    weights = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 4.5)
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    flat = (torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25))
    a, b = (x.expand(1, 3, 6, 6).contiguous() for x in flat)
    # every pixel p of a flat frame sees the share s(p) of the window inside: mean a*s, variance a^2 s(1 - s)
    expected = 0.0
    for y in range(6):
        for x in range(6):
            s = float(weights[max(0, 5 - y) : 11 - max(0, y), max(0, 5 - x) : 11 - max(0, x)].sum())
            mean_a, mean_b = 0.5 * s, 0.25 * s
            spread = s * (1 - s)
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            contrast = (2 * 0.125 * spread + 9e-4) / ((0.25 + 0.0625) * spread + 9e-4)
            expected += luminance * contrast / 36
    assert float(ssim(a, b, "fastvideo")) == pytest.approx(expected, abs=1e-6)


def test_fastvideo_caps_psnr():
    video = torch.rand(2, 3, 16, 16)
    assert psnr(video, video, "fastvideo").tolist() == [100, 100]
    far = torch.full((1, 3, 8, 8), 0.5)
    assert float(psnr(far + 0.1, far, "fastvideo")) == pytest.approx(20, abs=1e-5)


def test_conventions_are_named_in_rows(videos):
    for name in CONVENTIONS:
        assert {row.convention for row in fidelity(*videos, name)} == {name}
    with pytest.raises(ValueError, match="Unknown convention 'vmaf'; known are videosparse, svg, fastvideo"):
        fidelity(*videos, "vmaf")


def test_quarters():
    assert quarter_means(tuple(range(8))) == (0.5, 2.5, 4.5, 6.5)
    # 33 frames: 9, 8, 8 and 8 of them
    assert quarter_means(tuple(range(33))) == (4.0, 12.5, 20.5, 28.5)
    assert [math.isnan(x) for x in quarter_means((1.0, 2.0))] == [False, True, False, True]
    reference = torch.full((8, 3, 8, 8), 0.5)
    video = reference.clone()
    video[6:] += 0.1
    row = fidelity(video, reference)[0]
    assert row.per_quarter == pytest.approx((math.inf, math.inf, math.inf, 20), abs=1e-5)


def test_latents_and_perceptual_distance_are_rows_whose_worst_is_the_highest(videos):
    latents = torch.ones(4, 3, 2, 2)
    other = latents.clone()
    other[:, 1] += 0.5
    other[:, 2] -= 0.25
    found = fidelity(
        *videos, latents=(other[None], latents[None]), perceptual=lambda a, b: torch.tensor([0.1, 0.3, 0.2])
    )
    rows = {row.metric: row for row in found}
    assert rows["latent_l1"].per_frame == pytest.approx((0, 0.5, 0.25))
    assert (rows["latent_l1"].value, rows["latent_l1"].worst) == pytest.approx((0.25, 0.5))
    assert rows["lpips"].worst == pytest.approx(0.3)


def test_a_video_through_a_file_is_close_and_of_its_size():
    ramp = torch.linspace(0, 1, 33).expand(5, 3, 21, 33)
    again = decode_again(ramp, 16)
    assert again.shape == ramp.shape
    assert 0 < float((again - ramp).abs().mean()) < 0.02


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.ones(4, 3, 2, 2), torch.ones(4, 2, 2, 2), ValueError, "one shape"),
        (torch.ones(3, 2, 2), torch.ones(3, 2, 2), ValueError, "channels, frames, height, width"),
        (torch.ones(4, 3, 2, 2).int(), torch.ones(4, 3, 2, 2).int(), TypeError, "floating"),
        (torch.ones(4, 3, 2, 2), torch.zeros(4, 3, 2, 2), ValueError, "all zero"),
    ],
)
def test_errors_of_latents(a, b, error, message):
    with pytest.raises(error, match=message):
        relative_l1(a, b)
