"""How windows tile a video, and what they weigh."""

from itertools import pairwise

import pytest
import torch

from videosparse.stretching import windows_of
from videosparse.windows import Windows


@pytest.mark.parametrize(("size", "shared"), [(2, 1), (5, 2), (21, 4), (21, 20), (6, 4)])
def test_windows_tile_every_length(size, shared):
    windows = Windows(size, shared)
    for frames in range(1, 100):
        starts = windows.starts(frames)
        if frames <= size:
            assert starts == [0]
            continue
        assert starts[0] == 0
        assert starts[-1] + size == frames
        steps = [b - a for a, b in pairwise(starts)]
        assert all(step == size - shared for step in steps[:-1])
        assert 1 <= steps[-1] <= size - shared


@pytest.mark.parametrize(("size", "shared"), [(2, 1), (5, 2), (21, 4), (21, 20), (6, 4)])
@pytest.mark.parametrize("frames", [1, 2, 5, 22, 41, 81])
def test_weights_add_up_to_one(size, shared, frames):
    windows = Windows(size, shared)
    weights, starts = windows.weights(frames), windows.starts(frames)
    total = torch.zeros(frames, dtype=torch.float64)
    for start, own in zip(starts, weights, strict=True):
        total[start : start + len(own)] += own
    torch.testing.assert_close(total, torch.ones(frames, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (weights > 0).all()


def test_weights_are_smooth_and_mirrored():
    weights = Windows(21, 4).weights(38)
    assert weights.shape == (2, 21)
    assert (weights[0, :17] == 1).all()
    assert torch.equal(weights[1, :4], weights[0, 17:].flip(0))
    torch.testing.assert_close(weights[1, :4], torch.tensor([0.0380602, 0.3086583, 0.6913417, 0.9619398]))


@pytest.mark.parametrize(
    ("stride", "frames", "overlap", "message"),
    [
        (4, 80, 16, r"frames of context windows must be 4k\+1, at least 5 \(got 80\); use 77 or 81\."),
        (4, 1, 4, r"frames of context windows must be 4k\+1, at least 5 \(got 1\); use 5 or 9\."),
        (4, 81.0, 16, r"frames of context windows must be a number of pixel frames \(got 81.0\)"),
        (4, 81, 0, r"overlap of context windows must be a multiple of 4 from 4 to 80 \(got 0\); use 4\."),
        (4, 81, 18, r"overlap of context windows must be a multiple of 4 from 4 to 80 \(got 18\); use 16\."),
        (4, 81, 84, r"from 4 to 80 \(got 84\); use 80\."),
        (6, 163, 16, r"must be a multiple of 6 from 6 to 162 \(got 16\); use 12\."),
    ],
)
def test_bad_values(stride, frames, overlap, message):
    with pytest.raises(ValueError, match=message):
        windows_of(stride, frames, overlap)


def test_pixel_frames():
    assert windows_of(4, 81, 16) == Windows(21, 4)
    assert windows_of(6, 163, 18) == Windows(28, 3)
    with pytest.raises(ValueError, match=r"Neighbouring windows must share 1 to 4 of their 5 latent frames \(got 5\)"):
        Windows(5, 5)
