"""PSNR and SSIM against formulas and torchmetrics, and their convention."""

import json
import math

import pytest
import torch

from videosparse.metrics.fidelity import CONVENTION, fidelity, psnr, ssim


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
