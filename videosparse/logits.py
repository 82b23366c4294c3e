"""Scores that are changed before the softmax, so that a video can be longer than its model was trained for.

UltraViCo (arXiv 2511.20123): in a video beyond the trained length the many tokens that no training video had dilute
attention. So positive scores of tokens that are further apart than half the trained length are made smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from videosparse.checking import check_number
from videosparse.layout import VideoGrid

Arguments = tuple[float | None, int, int, int]
"""A `Reach`, or None, as custom ops take it."""


class Reach(NamedTuple):
    """`FarLogits` on one grid, in raster tokens.

    Args:
        alpha: factor of positive scores of a query and a key that are more than `window` apart.
        window: tokens.
        first: queries before this token belong to the first latent frame.
        seen: they do not see keys from this token on.
    """

    alpha: float
    window: int
    first: int
    seen: int

    def change(self, scores: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, video: int) -> torch.Tensor:
        """Scores [..., M, N] as they are to be, -inf where a key is not seen; what kernels are compared with.

        Args:
            scores: scaled, any float dtype.
            rows, keys: integers [..., M] and [..., N], raster token of each query and key; text is at `video` and
                beyond, and untouched.
            video: video tokens.
        """
        rows, keys = rows[..., :, None], keys[..., None, :]
        both = (rows < video) & (keys < video)
        far = both & ((rows - keys).abs() > self.window)
        # what is far is often the same for all heads, and scores are not: they are passed over as seldom as can be
        factor = torch.ones(far.shape, dtype=scores.dtype, device=scores.device).masked_fill_(far, self.alpha)
        scores = torch.minimum(scores, scores * factor)  # a smaller positive number, or the same negative one
        return scores.masked_fill_(both & (rows < self.first) & (keys >= self.seen), -torch.inf)


@dataclass(frozen=True)
class FarLogits:
    """Scores of far tokens are made smaller in videos beyond the trained length (UltraViCo, arXiv 2511.20123).

    Of scores s = scale * q k of two video tokens that are more than half the trained length apart, counted in raster
    tokens, the positive ones become alpha * s. Queries of the first latent frame do not see the latent frames beyond
    the trained ones. Text is neither far nor near: its rows and columns stay. A video that is no longer than the
    trained length is left alone, bit by bit.

    Args:
        trained: latent frames of the longest videos that the model was trained on: 21 for Wan 2.1.
        alpha: in (0, 1]. Published: 0.9.

    Raises:
        TypeError, ValueError: a value of another type, or out of range.

    Differs from the authors' code (their Triton kernel for Wan): there keys are made int8 less their mean before the
    sign is looked at, so that a row's scores are shifted; here it is the sign of the true score. There the last key of
    the trained frames counts as seen one token late and the first token of the second frame as one of the first; here
    frames are whole. The paper's stronger factor around harmonics of the rotary embedding, for models that repeat
    themselves (HunyuanVideo), is not built: `extend_rope` with "riflex" moves that harmonic.
    """

    trained: int
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.trained, bool) or not isinstance(self.trained, int):
            raise TypeError(f"FarLogits.trained must be an int of latent frames (got {self.trained!r}).")
        if self.trained < 1:
            raise ValueError(f"FarLogits.trained must be 1 latent frame or more (got {self.trained}).")
        check_alpha("FarLogits.alpha", self.alpha)

    def reach(self, grid: VideoGrid) -> Reach | None:
        """What it means on a grid; None where the video is no longer than the trained ones."""
        if grid.frames <= self.trained:
            return None
        seen = self.trained * grid.frame_tokens
        return Reach(float(self.alpha), seen // 2, grid.frame_tokens, seen)


def check_alpha(name: str, alpha: float) -> None:
    """Raise TypeError or ValueError unless `alpha` is a number in (0, 1]."""
    check_number(name, alpha)
    if not 0 < alpha <= 1:
        raise ValueError(f"{name} must lie in 0..1, 0 excluded (got {alpha}); the published one is 0.9.")


def arguments(reach: Reach | None) -> Arguments:
    """A reach as custom ops take it; see `from_arguments`."""
    if reach is None:
        return None, 0, 0, 0
    return reach.alpha, reach.window, reach.first, reach.seen


def from_arguments(alpha: float | None, window: int, first: int, seen: int) -> Reach | None:
    """Undo `arguments`."""
    return None if alpha is None else Reach(alpha, window, first, seen)
