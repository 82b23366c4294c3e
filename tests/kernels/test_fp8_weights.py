"""FP8 weights of the Hopper kernel, made of scores without exponentials: its functions and its assembly on the CPU."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

import gluon_on_cpu
import ptx_on_cpu

from videosparse.kernels import hopper_int8_softmax as softmax
from videosparse.kernels import hopper_kernel
from videosparse.kernels.quantize import KEY_ORDER

FUNCTIONS = gluon_on_cpu.kernel_on_cpu(hopper_kernel, softmax)
STEP = 1e-4
"""What one step of integer scores is worth, base 2: far below what is rounded."""


def weigh(x, hidden=None):
    """(weights, sums by row) for logarithms x [64, 128], base 2, with 2^8 as the highest weight."""
    own = torch.linspace(0.5, 2.0, 64)
    halves = torch.tensor([0.5, 3.0])
    scale = STEP * own[:, None] * halves.repeat_interleave(64)
    top = own - 1.0
    scores = ((x - 8.0 + top[:, None]) / scale).round().int()
    if hidden is not None:
        scores = scores.masked_fill(hidden, softmax.HIDDEN.value)
    value = gluon_on_cpu.value
    words, sums = FUNCTIONS["weigh_in_fp8"](value(scores), value(top), value(STEP * own), tuple(halves), 128)
    turned = FUNCTIONS["unpack_weights"](words, 128).as_subclass(torch.Tensor).float()
    weights = torch.empty_like(turned).unflatten(1, (8, 16))
    weights[:, :, list(KEY_ORDER)] = turned.unflatten(1, (8, 16))
    return weights.flatten(1), sums.as_subclass(torch.Tensor).sum(1)


def between(low, high):
    return torch.rand(64, 128) * (high - low) + low


def test_near_powers_of_two():
    x = torch.stack([between(-5.0, 8.0) for _ in range(8)])
    ratio = torch.stack([weigh(part)[0] for part in x]) / torch.exp2(x)
    assert abs(ratio.mean() - 1) <= 0.005
    assert 0.02 <= (ratio / ratio.mean() - 1).square().mean().sqrt() <= 0.033
    assert ratio.min() >= 0.88
    assert ratio.max() <= 1.11


@pytest.mark.parametrize("near", [-6.0, -7.0, -8.0, -9.0])
def test_far_keys_keep_their_weight(near):
    """Of thousands of keys below 2^-14 of the highest, which together may hold half of a row's weight."""
    x = near + 0.43 * torch.randn(64, 128)
    assert 0.8 <= weigh(x)[0].mean() / torch.exp2(x).mean() <= 1.2


def test_sums_are_of_the_weights_as_rounded():
    x = between(-9.0, 8.0)
    weights, sums = weigh(x)
    torch.testing.assert_close(sums, weights.sum(1), rtol=1e-3, atol=0)


def test_the_highest_is_exact_and_what_is_hidden_nothing():
    x = between(-12.0, -2.0)
    x[:, 5] = 8.0
    hidden = torch.rand(64, 128) < 0.3
    hidden[:, 5] = False
    weights, _ = weigh(x, hidden)
    assert (weights[:, 5] == 256.0).all()
    assert (weights[hidden] == 0.0).all()
    assert (weights[~hidden] > 0.0).any()
    assert (weigh(torch.full((64, 128), -40.0))[0] == 0.0).all()


def test_lines_are_those_of_the_numbers():
    words = [ptx_on_cpu.pair(torch.tensor([int(x, 0)], dtype=torch.int32)) for x in softmax.LINES.value.split()]
    steps = softmax.STEPS.value
    depth = steps - 8 * (softmax.PEAK.value + 7)
    expected = 1024.0 - depth, steps, 1024.0, 0.19 * steps
    for word, number in zip(words, expected, strict=True):
        assert (word.double() - number).abs().max() <= 0.01
