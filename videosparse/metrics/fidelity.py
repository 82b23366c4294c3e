"""How close a video is to its dense twin: PSNR, SSIM, LPIPS and the distance of latents, per frame and per quarter.

Papers are not comparable with one another here: some score decoded mp4 files, use a uniform SSIM window, or cap PSNR.
So every row names its convention (`CONVENTIONS`):

    videosparse   ours, the default. Tensors as the VAE gave them, in [0, 1], no file in between; PSNR without a cap
                  (equal frames give inf); SSIM (Wang et al. 2004) with an 11 x 11 Gaussian window of sigma 1.5,
                  K1 = .01, K2 = .03, borders reflected, mean over the channels (torchmetrics gives the same numbers);
                  LPIPS of AlexNet, fed [-1, 1]
    svg           Sparse-VideoGen and Radial Attention: frames of decoded mp4 files; SSIM with a uniform 11 x 11 window;
                  LPIPS of VGG, fed [0, 1] although its network expects [-1, 1]
    fastvideo     FastVideo's evaluation: PSNR capped at 100 dB; the Gaussian window with zeros beyond the borders;
                  LPIPS of AlexNet, fed [-1, 1]

A video's value is the mean over its frames in all of them. Which frames go in, raw or decoded, is up to the caller:
`videosparse.metrics.pairs` compares files, and `videosparse.mp4.decode_again` takes raw frames through a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

CONVENTION = "videosparse"

LOWER_IS_BETTER = ("lpips", "latent_l1")

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""LPIPS of each frame [frames] of two videos [frames, 3, height, width]; see `videosparse.metrics.perceptual`."""

_WINDOW = 11
_LEAST = _WINDOW // 2 + 1  # pixels a side that reflection needs
_SIGMA = 1.5


@dataclass(frozen=True)
class Convention:
    """What a paper's fidelity figures mean.

    Args:
        name: of the convention.
        window: of SSIM, 11 x 11.
        border: what SSIM sees beyond the frame.
        cap: most that PSNR can be, dB.
        network: of LPIPS.
        signed: whether LPIPS is fed [-1, 1], else [0, 1].
    """

    name: str
    window: Literal["gaussian", "uniform"] = "gaussian"
    border: Literal["reflect", "constant"] = "reflect"
    cap: float = math.inf
    network: Literal["alex", "vgg"] = "alex"
    signed: bool = True


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(CONVENTION),
        Convention("svg", window="uniform", network="vgg", signed=False),
        Convention("fastvideo", border="constant", cap=100.0),
    )
}


@dataclass(frozen=True)
class FidelityRow:
    """One metric of one video against its reference.

    Args:
        metric: "psnr" (dB), "ssim" (at most 1), "lpips" or "latent_l1" (both 0 for equal videos).
        value: mean over frames.
        worst: the worst frame: lowest, or highest for what is a distance.
        per_frame: every frame; latent frames for "latent_l1".
        convention: how it was computed.
    """

    metric: str
    value: float
    worst: float
    per_frame: tuple[float, ...]
    convention: str = CONVENTION

    @property
    def per_quarter(self) -> tuple[float, ...]:
        """Mean over the frames of each quarter of the video; NaN where fewer than 4 frames leave one empty."""
        return quarter_means(self.per_frame)

    def as_json(self) -> dict[str, object]:
        """The row for a JSON file, which knows no inf: None stands for it."""
        return {
            "metric": self.metric,
            "convention": self.convention,
            "value": _finite(self.value),
            "worst": _finite(self.worst),
            "per_quarter": [_finite(v) for v in self.per_quarter],
            "per_frame": [_finite(v) for v in self.per_frame],
        }


def quarter_means(per_frame: tuple[float, ...]) -> tuple[float, ...]:
    """Means of the four quarters of a sequence, of which frame i of n is in quarter 4 i // n; NaN for an empty one."""
    groups: list[list[float]] = [[], [], [], []]
    for index, value in enumerate(per_frame):
        groups[4 * index // len(per_frame)].append(value)
    return tuple(sum(group) / len(group) if group else math.nan for group in groups)


def convention_named(name: str) -> Convention:
    """The convention of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"Unknown convention {name!r}; known are {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]


def psnr(video: torch.Tensor, reference: torch.Tensor, convention: str = CONVENTION) -> torch.Tensor:
    """Peak signal-to-noise ratio of each frame, dB, fp64 [frames]; inf for equal frames, or the convention's cap.

    Args:
        video, reference: floating [frames, channels, height, width] in [0, 1].
        convention: one of `CONVENTIONS`.

    Raises:
        TypeError, ValueError: not two such tensors of one shape, or an unknown convention.
    """
    cap = convention_named(convention).cap
    _check(video, reference)
    # frame by frame: a long video in fp64 would not fit
    errors = [(a.double() - b.double()).square().mean() for a, b in zip(video, reference, strict=True)]
    return (-10 * torch.stack(errors).log10()).clamp_(max=cap).cpu()


def ssim(video: torch.Tensor, reference: torch.Tensor, convention: str = CONVENTION) -> torch.Tensor:
    """Structural similarity of each frame, fp64 [frames], at most 1.

    Args:
        video, reference: floating [frames, channels, height, width] in [0, 1], at least 6 pixels a side.
        convention: one of `CONVENTIONS`.

    Raises:
        TypeError, ValueError: not two such tensors of one shape, or an unknown convention.
    """
    chosen = convention_named(convention)
    _check(video, reference)
    if min(video.shape[-2:]) < _LEAST:
        raise ValueError(f"SSIM needs frames of at least {_LEAST} x {_LEAST} pixels (got {list(video.shape[-2:])}).")
    frames = [_ssim_frame(a.double(), b.double(), chosen) for a, b in zip(video, reference, strict=True)]
    return torch.stack(frames).cpu()


def relative_l1(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Distance of latents of each latent frame, fp64 [frames]: mean |a - b| over mean |b|.

    Args:
        latents, reference: floating [channels, frames, height, width], or with a leading 1 as Diffusers returns them
            with output_type="latent".

    Raises:
        TypeError, ValueError: not two such tensors of one shape, or a frame of the reference is all zero.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"Both latents must have one shape (got {list(latents.shape)} and {list(reference.shape)}).")
    a, b = (x[0] if x.dim() == 5 and x.shape[0] == 1 else x for x in (latents, reference))
    if a.dim() != 4 or 0 in a.shape:
        raise ValueError(f"Latents must be [channels, frames, height, width], none 0 (got {list(latents.shape)}).")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"Latents must be floating (got {a.dtype} and {b.dtype}).")
    size = b.double().abs().mean(dim=(0, 2, 3))
    if not bool((size > 0).all()):
        raise ValueError("A frame of the reference latents is all zero; relative distances need one that is not.")
    return ((a.double() - b.double()).abs().mean(dim=(0, 2, 3)) / size).cpu()


def fidelity(
    video: torch.Tensor,
    reference: torch.Tensor,
    convention: str = CONVENTION,
    *,
    perceptual: Perceptual | None = None,
    latents: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[FidelityRow, ...]:
    """How close a video [frames, channels, height, width] in [0, 1] is to its reference, one row a metric.

    Args:
        video, reference: see `psnr`.
        convention: one of `CONVENTIONS`.
        perceptual: LPIPS in this convention (`videosparse.metrics.perceptual.load_perceptual`); None leaves it out.
        latents: of the video and of the reference, see `relative_l1`; None leaves them out.

    Raises:
        TypeError, ValueError: not two such tensors of one shape, frames below 6 pixels a side, an unknown convention.
    """
    values = {"psnr": psnr(video, reference, convention), "ssim": ssim(video, reference, convention)}
    if perceptual is not None:
        values["lpips"] = perceptual(video, reference)
    if latents is not None:
        values["latent_l1"] = relative_l1(*latents)
    rows = []
    for name, found in values.items():
        per_frame = tuple(found.tolist())
        worst = max if name in LOWER_IS_BETTER else min
        rows.append(FidelityRow(name, math.fsum(per_frame) / len(per_frame), worst(per_frame), per_frame, convention))
    return tuple(rows)


def _ssim_frame(a: torch.Tensor, b: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Mean SSIM of two frames, fp64 [channels, height, width]."""
    maps = torch.stack((a, b, a * a, b * b, a * b))
    mean_a, mean_b, square_a, square_b, product = _blur(maps, convention)
    var_a = (square_a - mean_a**2).clamp_(min=0)
    var_b = (square_b - mean_b**2).clamp_(min=0)
    covariance = product - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    similarity: torch.Tensor = luminance * (2 * covariance + c2) / (var_a + var_b + c2)
    return similarity.mean()


def _blur(maps: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Weighted means of [n, channels, height, width] around every pixel, rows and columns apart."""
    half = _WINDOW // 2
    width = _SIGMA if convention.window == "gaussian" else math.inf
    window = [math.exp(-((place / width) ** 2) / 2) for place in range(-half, half + 1)]
    weights = [weight / math.fsum(window) for weight in window]
    padded = functional.pad(maps, [half] * 4, mode=convention.border)
    return _slide(_slide(padded, weights, -1), weights, -2)


def _slide(maps: torch.Tensor, weights: Sequence[float], dim: int) -> torch.Tensor:
    """Sums of neighbours along a dimension, weighted; a convolution by fp64 takes a CPU four times as long."""
    size = maps.shape[dim] - len(weights) + 1
    total = maps.narrow(dim, 0, size) * weights[0]
    for place, weight in enumerate(weights[1:], 1):
        total.add_(maps.narrow(dim, place, size), alpha=weight)
    return total


def _check(video: torch.Tensor, reference: torch.Tensor) -> None:
    if video.shape != reference.shape:
        raise ValueError(f"Both videos must have one shape (got {list(video.shape)} and {list(reference.shape)}).")
    if video.dim() != 4 or 0 in video.shape:
        raise ValueError(f"A video must be [frames, channels, height, width], none 0 (got {list(video.shape)}).")
    for tensor in (video, reference):
        if not tensor.is_floating_point():
            raise TypeError(f"A video must be floating in [0, 1] (got {tensor.dtype}); divide uint8 by 255.")
        low, high = tensor.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"A video must lie in [0, 1] (got {float(low):.3g} to {float(high):.3g}).")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
