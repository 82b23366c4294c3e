"""Rotary embeddings beyond the trained length: RIFLEx, NTK-aware scaling and position interpolation, in time only.

`videosparse.extend_rope` puts a `RopeExtension` on a transformer. It is one forward hook on the module that makes the
rotary embedding, and rewrites the temporal columns of what that module returns. So it needs nothing of how attention
runs, and works with every processor, under regional compilation, with offloading, and on a shard of the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROPES = ("none", "riflex", "ntk", "pi")

_HANDLE = "_videosparse_rope"


@dataclass(frozen=True, eq=False)
class TemporalRotary:
    """Where a transformer makes its rotary embedding, and what turns along time there.

    Args:
        module: gets latents [B, C, F, H, W] and returns (cos, sin) [..., D], each angle twice, side by side, those of
            time first.
        dim: columns that belong to time, two for each frequency.
        theta: base of the frequencies: number j, from 0, is theta ** (-2 j / dim) a latent frame.
        patch: latent frames in one token.
        stride: pixel frames in one latent frame, after the first.
        intrinsic: number of the frequency, from 1, whose return makes a long video repeat itself; None is unknown.
    """

    module: torch.nn.Module
    dim: int
    theta: float
    patch: int
    stride: int
    intrinsic: int | None

    def frequencies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """fp64 [dim / 2], radians a latent frame; fp32 on devices without fp64."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return self.theta ** (-torch.arange(0, self.dim, 2, dtype=dtype, device=device) / self.dim)

    def latent_frames(self, name: str, num_frames: int) -> int:
        """Token frames of a video of `num_frames` pixel frames.

        Raises:
            ValueError: no number of frames that the model can make.
        """
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"{name} must be a number of pixel frames, 1 or more (got {num_frames!r}).")
        if (num_frames - 1) % self.stride:
            low = (num_frames - 1) // self.stride * self.stride + 1
            raise ValueError(f"{name} must be {self.stride}k+1 (got {num_frames}); use {low} or {low + self.stride}.")
        return ((num_frames - 1) // self.stride + 1) // self.patch


@dataclass(frozen=True, eq=False)
class RopeExtension:
    """How the temporal rotary embedding of a transformer is stretched; a torch forward hook.

    A video that is no longer than the trained length is left alone, bit by bit. Beyond it, with s = length / trained:

    - "riflex" (RIFLEx, arXiv 2502.15894): the frequency number `k` becomes 0.9 * 2 pi / length, so that it completes
      less than one period, if it would complete more.
    - "ntk" (NTK-aware scaling): the base grows by s ** (dim / (dim - 2)), so that the slowest frequency is divided by s
      and the fastest is kept.
    - "pi" (position interpolation, arXiv 2306.15595): positions are divided by s.

    Args:
        kind: "riflex", "ntk" or "pi".
        rotary: where and what.
        trained: latent frames of the longest videos that the model was trained on.
        length: latent frames to stretch to, for videos longer than `trained`; None takes each video's own.
        k: of RIFLEx, from 1.
    """

    kind: str
    rotary: TemporalRotary
    trained: int
    length: int | None
    k: int

    def __call__(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rotary embedding of these latents, in the shape and dtype of the stock one; None leaves it.

        Raises:
            ValueError: so many frames that they cannot be told apart.
        """
        frames = int(args[0].shape[2]) // self.rotary.patch
        changed = self.changed(frames)
        if not changed:
            return None
        cos, sin = output
        angles = self._positions(cos, sin, frames)[..., None] * self._stretched(frames, cos.device)
        parts = []
        for stock, turned in ((cos, angles.cos()), (sin, angles.sin())):
            new = stock.clone()
            pair = turned.repeat_interleave(2, dim=-1).to(stock.dtype)
            columns = slice(2 * changed.start, 2 * changed.stop)
            new[..., columns] = pair[..., columns]
            parts.append(new)
        return parts[0], parts[1]

    def changed(self, frames: int) -> range:
        """Numbers, from 0, of the frequencies that a video of so many latent frames has changed."""
        if frames <= self.trained:
            return range(0)
        if self.kind != "riflex":
            return range(self.rotary.dim // 2)
        slow = self._target(frames) * self.rotary.theta ** (-2 * (self.k - 1) / self.rotary.dim) <= 2 * math.pi
        return range(0) if slow else range(self.k - 1, self.k)

    def _target(self, frames: int) -> int:
        return frames if self.length is None else max(frames, self.length)

    def _stretched(self, frames: int, device: torch.device) -> torch.Tensor:
        """Frequencies [dim / 2] for a video of so many latent frames."""
        target, own = self._target(frames), self.rotary.frequencies(device)
        scale, dim = target / self.trained, self.rotary.dim
        if self.kind == "pi":
            return own / scale
        if self.kind == "ntk":
            # the base times scale ** (dim / (dim - 2)), taken to the power -2 j / dim
            numbers = torch.arange(dim // 2, dtype=own.dtype, device=device)
            return own * scale ** (-2 * numbers / max(dim - 2, 1))
        stretched = own.clone()
        stretched[self.k - 1] = 0.9 * 2 * math.pi / target
        return stretched

    def _positions(self, cos: torch.Tensor, sin: torch.Tensor, frames: int) -> torch.Tensor:
        """The latent frame [...] of each token, read off the slowest rotation.

        Context parallelism hands this hook a shard of the sequence; which one, only the angles tell without asking
        Diffusers' private configuration. They are exact: a frame is far more than the rounding of a cosine.
        """
        slowest: float = self.rotary.theta ** (2 / self.rotary.dim - 1)
        if (frames - 1) * slowest >= math.pi:
            raise ValueError(
                f"{frames} latent frames are more than the slowest frequency of this rotary embedding tells apart "
                f"({math.ceil(math.pi / slowest)}); use fewer frames."
            )
        column = self.rotary.dim - 1
        dtype = torch.float32 if cos.device.type == "mps" else torch.float64
        angles = torch.atan2(sin[..., column].to(dtype), cos[..., column].to(dtype))
        return (angles / slowest).round()


def extend(
    transformer: torch.nn.Module,
    rotary: TemporalRotary,
    kind: str,
    *,
    trained_frames: int | None = None,
    frames: int | None = None,
    k: int | None = None,
) -> None:
    """Put an extension on a transformer, in place of one that is there; "none" only takes that off.

    Raises:
        ValueError: see `videosparse.extend_rope`.
    """
    extension = _extension(rotary, kind, trained_frames, frames, k)
    undo(transformer)
    if extension is not None:
        handle = rotary.module.register_forward_hook(extension)
        setattr(transformer, _HANDLE, (handle, extension))


def stretches(transformer: torch.nn.Module, num_frames: int) -> bool:
    """Whether the extension on a transformer, if any, changes anything for a call on so many pixel frames."""
    found = vars(transformer).get(_HANDLE)
    if found is None:
        return False
    extension: RopeExtension = found[1]
    return len(extension.changed(extension.rotary.latent_frames("num_frames", num_frames))) > 0


def undo(transformer: torch.nn.Module) -> None:
    """Take an extension off; no extension is no error."""
    found = vars(transformer).pop(_HANDLE, None)
    if found is not None:
        found[0].remove()


def _extension(
    rotary: TemporalRotary, kind: str, trained_frames: int | None, frames: int | None, k: int | None
) -> RopeExtension | None:
    if kind not in ROPES:
        raise ValueError(f"kind must be {', '.join(ROPES[:-1])} or {ROPES[-1]} (got {kind!r}).")
    if kind == "none":
        return None
    if k is not None and kind != "riflex":
        raise ValueError(f"k is the number of RIFLEx's frequency, and this is {kind}; drop it.")
    if trained_frames is None and kind != "riflex":
        raise ValueError(f"{kind} needs trained_frames, the pixel frames that the model was trained on, such as 81.")
    number = rotary.intrinsic if k is None else k
    if kind == "riflex" and number is None:
        raise ValueError(
            f"No intrinsic frequency is known for {rotary.dim} temporal columns; give k, the number of the frequency "
            "whose period is where this model's videos begin to repeat themselves."
        )
    if number is not None and not 1 <= number <= rotary.dim // 2:
        raise ValueError(f"k must be 1 to {rotary.dim // 2}, the temporal frequencies of this model (got {k}).")
    trained = 1 if trained_frames is None else rotary.latent_frames("trained_frames", trained_frames)
    length = None if frames is None else rotary.latent_frames("frames", frames)
    return RopeExtension(kind, rotary, trained, length, number or 1)
