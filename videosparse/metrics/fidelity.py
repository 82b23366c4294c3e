"""How close a video is to its dense twin: PSNR and SSIM, per frame, on raw tensors.

Papers are not comparable with one another here: some score decoded mp4 files, use a uniform SSIM window, or cap PSNR.
This file's convention, named "videosparse" in every row: tensors as the VAE gave them, in [0, 1], no file in between;
PSNR without a cap (equal frames give inf); SSIM (Wang et al. 2004) with an 11 x 11 Gaussian window of sigma 1.5,
K1 = .01, K2 = .03, borders reflected, mean over the channels (torchmetrics gives the same numbers); a video's value is
the mean over its frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

CONVENTION = "videosparse"

_WINDOW = 11
_LEAST = _WINDOW // 2 + 1  # pixels a side that reflection needs
_SIGMA = 1.5


@dataclass(frozen=True)
class FidelityRow:
    """One metric of one video against its reference.

    Args:
        metric: "psnr" (dB) or "ssim" (at most 1).
        value: mean over frames.
        worst: the lowest frame.
        per_frame: every frame.
        convention: how it was computed.
    """

    metric: str
    value: float
    worst: float
    per_frame: tuple[float, ...]
    convention: str = CONVENTION

    def as_json(self) -> dict[str, object]:
        """The row for a JSON file, which knows no inf: None stands for it."""
        return {
            "metric": self.metric,
            "convention": self.convention,
            "value": _finite(self.value),
            "worst": _finite(self.worst),
            "per_frame": [_finite(v) for v in self.per_frame],
        }


def psnr(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each frame, dB, fp64 [frames]; inf for equal frames.

    Args:
        video, reference: floating [frames, channels, height, width] in [0, 1].

    Raises:
        TypeError, ValueError: not two such tensors of one shape.
    """
    _check(video, reference)
    # frame by frame: a long video in fp64 would not fit
    errors = [(a.double() - b.double()).square().mean() for a, b in zip(video, reference, strict=True)]
    return -10 * torch.stack(errors).log10().cpu()


def ssim(video: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each frame, fp64 [frames], at most 1.

    Args:
        video, reference: floating [frames, channels, height, width] in [0, 1], at least 6 pixels a side.

    Raises:
        TypeError, ValueError: not two such tensors of one shape.
    """
    _check(video, reference)
    if min(video.shape[-2:]) < _LEAST:
        raise ValueError(f"SSIM needs frames of at least {_LEAST} x {_LEAST} pixels (got {list(video.shape[-2:])}).")
    return torch.stack([_ssim_frame(a.double(), b.double()) for a, b in zip(video, reference, strict=True)]).cpu()


def fidelity(video: torch.Tensor, reference: torch.Tensor) -> tuple[FidelityRow, ...]:
    """PSNR and SSIM of a video [frames, channels, height, width] in [0, 1] against its reference, as rows.

    Raises:
        TypeError, ValueError: not two such tensors of one shape, or frames below 6 pixels a side.
    """
    rows = []
    for name, metric in (("psnr", psnr), ("ssim", ssim)):
        values = tuple(metric(video, reference).tolist())
        rows.append(FidelityRow(name, math.fsum(values) / len(values), min(values), values))
    return tuple(rows)


def _ssim_frame(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean SSIM of two frames, fp64 [channels, height, width]."""
    maps = torch.stack((a, b, a * a, b * b, a * b))
    mean_a, mean_b, square_a, square_b, product = _blur(maps)
    var_a = (square_a - mean_a**2).clamp_(min=0)
    var_b = (square_b - mean_b**2).clamp_(min=0)
    covariance = product - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    similarity: torch.Tensor = luminance * (2 * covariance + c2) / (var_a + var_b + c2)
    return similarity.mean()


def _blur(maps: torch.Tensor) -> torch.Tensor:
    """Gaussian means of [n, channels, height, width] around every pixel, rows and columns apart."""
    offset = torch.arange(_WINDOW, dtype=maps.dtype, device=maps.device) - _WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    window = (window / window.sum())[None, None]
    flat = functional.pad(maps.flatten(0, 1)[:, None], [_WINDOW // 2] * 4, mode="reflect")
    flat = functional.conv2d(functional.conv2d(flat, window[..., None]), window[:, :, None])
    return flat.view(maps.shape)


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
