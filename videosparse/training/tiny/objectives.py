"""What is minimised and what is measured: losses of the VAE and of flow matching, PSNR, a plain sampler.

Shapes: video [B, 3, F, H, W] in [-1, 1]; latents [B, C, T, h, w]; text embeddings [B, S, E].
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videosparse.training.tiny.parallel_vae import ParallelVae

FLOW_SHIFT = 3.0


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean SSIM with a uniform window over frames. a, b: fp32 [B, C, F, H, W] in [0, 1]."""
    a, b = (x.transpose(1, 2).flatten(0, 1) for x in (a, b))
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)
    mu_a, mu_b, aa, bb, ab = F.avg_pool2d(maps, window, stride=1).chunk(5, 1)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean()


@torch.no_grad()
def object_mask(video: Tensor, rim: int = 3, before_and_after: int = 2) -> Tensor:
    """Where objects are in a video [B, 3, F, H, W] in [-1, 1], or were or will be in two frames: [B, 1, F, H, W], 0..1.

    Objects are the only saturated things in this world; `rim` pixels around them belong to them, since an outline is
    where it ends, and so do the places of the frames before and after, where a decoder leaves traces.
    """
    saturation = (video.amax(1, keepdim=True) - video.amin(1, keepdim=True)).div(0.9).clamp(0, 1)
    wide = F.max_pool3d(saturation, (1, 2 * rim + 1, 1), 1, (0, rim, 0))
    wide = F.max_pool3d(wide, (1, 1, 2 * rim + 1), 1, (0, 0, rim))
    return F.max_pool3d(wide, (2 * before_and_after + 1, 1, 1), 1, (before_and_after, 0, 0))


def vae_loss(
    model: ParallelVae,
    video: Tensor,
    noise: Tensor,
    kl_weight: float,
    object_weight: float = 8.0,
    square_weight: float = 1.0,
) -> Tensor:
    """`decoder_loss` of a sample of the posterior, and KL. video in [-1, 1]; noise like the latents."""
    mean, logvar = model.encode(video)
    mean, logvar = mean.float(), logvar.float()
    decoded = model.decode(mean + noise * torch.exp(0.5 * logvar))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return decoder_loss(decoded, video, object_weight, square_weight) + kl_weight * kl


def decoder_loss(decoded: Tensor, video: Tensor, object_weight: float = 8.0, square_weight: float = 1.0) -> Tensor:
    """L1 + 0.1 (1 - SSIM) + 0.5 temporal-difference L1 + squares, of videos in [-1, 1].

    Objects cover a few percent of the world, so their pixels weigh `1 + object_weight` times as much: otherwise the
    patterns behind an object get all the capacity, and what moves is blurred beyond recognition. The squared error is
    there for the start: the L1 of a small bright object is lowest for a while where the object is missing.
    """
    decoded, target = decoded.float(), video.float()
    weight = 1 + object_weight * object_mask(target)
    error = decoded - target
    l1 = (error.abs() * weight).mean()
    motion = ((error[:, :, 1:] - error[:, :, :-1]).abs() * weight[:, :, 1:]).mean()
    similarity = ssim((decoded + 1) / 2, (target + 1) / 2)
    square = (error.square() * weight).mean()
    return l1 + 0.1 * (1 - similarity) + 0.5 * motion + square_weight * square


def psnr(decoded: Tensor, video: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over clips of the PSNR in dB, of videos in [-1, 1]; with weights [B, 1, F, H, W], of what they favour."""
    square = (decoded.float().clamp(-1, 1) - video.float()).div(2).square().mean(1, keepdim=True)
    weight = torch.ones_like(square) if weight is None else weight
    error = (square * weight).flatten(1).mean(1) / weight.flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-10))).mean()


def sample_sigmas(batch: int, device: torch.device, uniform_share: float = 0.1, shift: float = FLOW_SHIFT) -> Tensor:
    """Noise levels [B] in (0, 1): logit-normal, stratified over the batch, then shifted as the scheduler does.

    A larger shift than the scheduler's trains more on what noise hides: where objects are and how they move. A share
    is uniform instead, so that the ends of the schedule, where sampling starts and stops, are trained.
    """
    quantile = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    quantile = quantile.clamp(1e-5, 1 - 1e-5)
    normal = torch.sigmoid(math.sqrt(2.0) * torch.erfinv(2 * quantile - 1))
    uniform = torch.rand(batch, device=device)
    t = torch.where(torch.rand(batch, device=device) < uniform_share, uniform, normal)
    return shift * t / (1 + (shift - 1) * t)


def flow_error(transformer: nn.Module, text: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Squared flow-matching error [B, C, T, h, w]: the network predicts noise - x0 at (1 - sigma) x0 + sigma noise."""
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * x0 + level * noise
    predicted = transformer(
        hidden_states=noisy, timestep=sigma * 1000.0, encoder_hidden_states=text, return_dict=False
    )[0]
    error: Tensor = (predicted.float() - (noise - x0)).square()
    return error


def object_weight(objects: Tensor, sigma: Tensor, weight: float) -> Tensor:
    """Weights [B, 1, T, h, w], mean 1, that favour cells with objects. objects: [B, 1, T, h, w] in 0..1; sigma [B].

    An object covers a few percent of a frame, so its shape and path hardly show in the plain mean. The weight fades
    as noise grows: where the input does not show an object yet, weighting its cells would make the best prediction
    one that sees objects everywhere.
    """
    raw = 1 + weight * (1 - sigma.view(-1, 1, 1, 1, 1)) * objects.float()
    return raw / raw.mean()


@torch.no_grad()
def euler_sample(
    transformer: nn.Module, text: Tensor, empty: Tensor, noise: Tensor, steps: int = 20, guidance: float = 4.0
) -> Tensor:
    """Latents of a plain Euler solver with guidance. text [B, S, E], empty [1, S, E], noise [B, C, T, h, w]."""
    t = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = (FLOW_SHIFT * t / (1 + (FLOW_SHIFT - 1) * t)).tolist()
    both = torch.cat([text, empty.expand_as(text)])
    x = noise.float()
    for now, following in itertools.pairwise(sigmas):
        timestep = torch.full((len(both),), now * 1000.0, device=x.device)
        out = transformer(
            hidden_states=torch.cat([x, x]), timestep=timestep, encoder_hidden_states=both, return_dict=False
        )[0]
        cond, uncond = out.float().chunk(2)
        x = x + (following - now) * (uncond + guidance * (cond - uncond))
    return x
