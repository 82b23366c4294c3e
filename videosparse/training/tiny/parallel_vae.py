"""The Wan VAE over whole clips, for training and for encoding many clips.

Shapes: video [B, 3, F, H, W] in [-1, 1]; latents [B, C, T, h, w] with T = 1 + (F - 1) / 4, h = H / 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import Tensor


def _rms_silu(x: Tensor, gain: Tensor) -> Tensor:
    """SiLU of the Wan RMS norm over channels. x: [B, C, F, H, W]; gain: [C, 1, 1, 1]; computed in fp32."""
    xf = x.float()
    inverse = xf.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    return F.silu((xf * inverse).to(x.dtype) * gain.to(x.dtype))


class ParallelVae:
    """The Wan VAE over all frames at once, with the same weights and result as its chunk-by-chunk loop.

    Every temporal operator of the model is causal, so the chunked cache only saves memory. Running whole
    clips needs five times fewer kernel launches at 17 frames, which is what limits training speed.
    `fused` compiles the norm and the activation into one kernel.
    """

    def __init__(self, vae: AutoencoderKLWan, fused: bool = False) -> None:
        self.vae = vae
        self.fused = fused
        self.rms_silu: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(_rms_silu, dynamic=True) if fused else _rms_silu
        )

    @staticmethod
    def fits(vae: Any) -> bool:
        """Whether this VAE is of the kind that runs so: Wan 2.1's, not the residual one of Wan 2.2's 5B model."""
        return isinstance(vae, AutoencoderKLWan) and not vae.config.is_residual

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        gain = norm.gamma * norm.scale
        if self.fused:
            # The reduced dimension has three sizes in all; a kernel that knows it keeps the sum in registers.
            torch._dynamo.mark_static(x, 1)
            torch._dynamo.mark_static(gain, 0)
        return self.rms_silu(x, gain)

    def _residual(self, block: WanResidualBlock, x: Tensor) -> Tensor:
        h: Tensor = block.conv_shortcut(x)
        x = block.conv1(self._norm(block.norm1, x))
        x = block.conv2(self._norm(block.norm2, x))
        return x + h

    def _mid(self, block: Any, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        return self._residual(block.resnets[1], block.attentions[0](x))

    @staticmethod
    def _spatial(layer: WanResample, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
        video: Tensor = y.view(b, t, *y.shape[1:]).transpose(1, 2)
        return video

    def _down(self, layer: WanResample, x: Tensor) -> Tensor:
        """The first frame stays alone; later outputs see a window of three frames with stride two."""
        x = self._spatial(layer, x)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], layer.time_conv(x)], 2)

    def _up(self, layer: WanResample, x: Tensor) -> Tensor:
        """The first frame is not doubled and is not seen by the temporal convolution of the others."""
        b, c, t, h, w = x.shape
        if t > 1:
            rest = layer.time_conv(x[:, :, 1:]).reshape(b, 2, c, t - 1, h, w)
            rest = torch.stack((rest[:, 0], rest[:, 1]), 3).reshape(b, c, 2 * (t - 1), h, w)
            x = torch.cat([x[:, :, :1], rest], 2)
        return self._spatial(layer, x)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each [B, z, T, h, w], of video [B, 3, F, H, W]."""
        encoder = self.vae.encoder
        x = encoder.conv_in(video)
        for layer in encoder.down_blocks:
            x = self._down(layer, x) if isinstance(layer, WanResample) else self._residual(layer, x)
        x = encoder.conv_out(self._norm(encoder.norm_out, self._mid(encoder.mid_block, x)))
        mean, logvar = self.vae.quant_conv(x).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unclamped video [B, 3, F, H, W] of raw (not normalised) latents [B, z, T, h, w]."""
        decoder = self.vae.decoder
        x = self._mid(decoder.mid_block, decoder.conv_in(self.vae.post_quant_conv(latents)))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            if block.upsamplers is not None:
                x = self._up(block.upsamplers[0], x)
        video: Tensor = decoder.conv_out(self._norm(decoder.norm_out, x))
        return video
