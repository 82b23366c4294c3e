"""Where a token sits: the video grid after patching, and the sequence that attention sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from videosparse.checking import check_device, check_whole, shown


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class VideoGrid:
    """The token grid of a video after VAE compression and patching.

    Tokens are in raster order: frame slowest, then row, then column.

    Args:
        frames: latent frames (not pixel frames), >= 1.
        height: token rows of a frame, >= 1.
        width: token columns of a frame, >= 1.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            check_whole(f"VideoGrid.{name}", getattr(self, name))

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the whole video."""
        return self.frames * self.frame_tokens

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def check_grid(name: str, value: VideoGrid) -> None:
    """Raise TypeError unless `value` is a `VideoGrid`."""
    if not isinstance(value, VideoGrid):
        raise TypeError(f"{name} must be a VideoGrid (got {shown(value)}); pass VideoGrid(frames, height, width).")


@dataclass(frozen=True)
class TokenLayout:
    """The sequence that attention sees: video tokens, an optional gap, then text tokens.

    Positions [0, grid.tokens) are video, [text_start, text_start + text) are text. What lies between is a gap that
    nobody reads: sparse attention lets text start on a fresh block, so that no block holds both (see `aligned`).

    Args:
        grid: the video tokens.
        text: text tokens in the sequence, padding included; 0 when text is not part of self-attention (Wan).
        text_start: position of the first text token; defaults to `grid.tokens` (no gap).
        seq_lens: int32 [B], where each sample ends, as a position in this sequence: text keys at or beyond
            `seq_lens[b]` are padding. None when every token is valid.

    Raises:
        TypeError: grid is no VideoGrid, text or text_start no int, seq_lens no tensor.
        ValueError: negative text, a text_start inside the video, or seq_lens of the wrong shape or dtype.
    """

    grid: VideoGrid
    text: int = 0
    text_start: int = -1
    seq_lens: torch.Tensor | None = field(default=None, compare=False)
    _aligned: dict[int, TokenLayout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_grid("TokenLayout.grid", self.grid)
        check_whole("TokenLayout.text", self.text, 0)
        check_whole("TokenLayout.text_start", self.text_start, -1)
        if self.text_start == -1:
            object.__setattr__(self, "text_start", self.grid.tokens)
        if self.text_start < self.grid.tokens:
            raise ValueError(
                f"TokenLayout.text_start must not lie inside the video: expected >= {self.grid.tokens} tokens of grid "
                f"{self.grid} (got {self.text_start})."
            )
        lens = self.seq_lens
        if lens is not None and not isinstance(lens, torch.Tensor):
            raise TypeError(
                f"TokenLayout.seq_lens must be None or an int32 tensor [batch] (got {type(lens).__name__}); pass "
                "torch.tensor(ends, dtype=torch.int32)."
            )
        if lens is not None and (lens.dim() != 1 or lens.dtype != torch.int32):
            raise ValueError(
                f"TokenLayout.seq_lens must be int32 of shape [batch] (got {lens.dtype} of shape {list(lens.shape)})."
            )
        if lens is not None and not lens.is_contiguous():  # kernels read one after another
            object.__setattr__(self, "seq_lens", lens.contiguous())

    @property
    def video(self) -> int:
        """Video tokens."""
        return self.grid.tokens

    @property
    def length(self) -> int:
        """Sequence length, gap and padding included."""
        return self.text_start + self.text if self.text else self.video

    def aligned(self, block: tuple[int, int]) -> TokenLayout:
        """The same tokens with text starting on a fresh block of `block` = (query rows, key rows).

        `seq_lens` moves with the text. Without text nothing changes. All layers of a forward get the same object.

        Raises:
            TypeError: block is no tuple of ints.
            ValueError: a number of rows below 1.
        """
        if not isinstance(block, tuple):
            raise TypeError(f"block must be a tuple (query rows, key rows) (got {shown(block)}).")
        for rows in block:
            check_whole("block", rows)
        if not self.text:
            return self
        size = max(block)
        if size not in self._aligned:
            start = ceil_div(self.video, size) * size
            lens = None if self.seq_lens is None else self.seq_lens + (start - self.text_start)
            self._aligned[size] = replace(self, text_start=start, seq_lens=lens)
        return self._aligned[size]

    def key_mask(self, batch: int, device: torch.device | str) -> torch.Tensor:
        """Bool [batch, length]: True where a position holds a valid token. For references and dense masks.

        Raises:
            TypeError: an argument of another type.
            ValueError: `seq_lens` belongs to another batch size, or there is no such device.
        """
        check_whole("batch", batch, 0)
        device = check_device(device)
        position = torch.arange(self.length, device=device)
        token = (position < self.video) | (position >= self.text_start)
        if self.seq_lens is None:
            return token.expand(batch, -1)
        self.check_batch(batch)
        ends = self.seq_lens.to(device)[:, None]
        return token & ((position < self.video) | (position < ends))

    def check_batch(self, batch: int) -> None:
        """Raise ValueError unless `seq_lens` fits a batch of this size."""
        if self.seq_lens is not None and self.seq_lens.shape[0] != batch:
            raise ValueError(
                f"TokenLayout.seq_lens is for a batch of {self.seq_lens.shape[0]}, the tensors have batch {batch}; "
                "make one layout per call."
            )


def check_is_layout(layout: TokenLayout) -> None:
    """Raise TypeError unless a layout is a `TokenLayout`."""
    if not isinstance(layout, TokenLayout):
        instead = (
            "pass TokenLayout(grid)" if isinstance(layout, VideoGrid) else "pass TokenLayout(VideoGrid(...), text)"
        )
        raise TypeError(f"layout must be a TokenLayout (got {shown(layout)}); {instead}.")
