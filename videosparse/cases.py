"""Real models and the token grids they run on: what tests and benchmarks share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from videosparse.layout import TokenLayout, VideoGrid


@dataclass(frozen=True)
class ModelSpec:
    """The numbers of a published model that decide the shape of its self-attention.

    Args:
        name: how the command line calls it.
        family: "wan", "hunyuan_video" or "mochi".
        variant: whose settings suit it: one of the `variants` of its family.
        layers, heads, head_dim: of the transformer's self-attention.
        stride: (time, space) compression of the VAE.
        text: text tokens inside self-attention (0 for Wan).
        patch: spatial patch size.
        ffn: width of the feed-forward layers; 0 where nothing asks for it.
        experts: transformers that take turns over the steps.
    """

    name: str
    family: str
    variant: str
    layers: int
    heads: int
    head_dim: int
    stride: tuple[int, int]
    text: int = 0
    patch: int = 2
    ffn: int = 0
    experts: int = 1

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of so many pixel frames."""
        return (num_frames - 1) // self.stride[0] + 1

    def grid(self, num_frames: int, height: int, width: int, multiple: int = 1) -> VideoGrid:
        """The token grid of a video of `num_frames` pixel frames and height x width pixels.

        Args:
            num_frames, height, width: in pixels.
            multiple: what height and width have to be a multiple of beside the model's own step.

        Raises:
            ValueError: a size that the model cannot take, with the nearest that it can.
        """
        time, space = self.stride
        if num_frames < 1 or (num_frames - 1) % time:
            low = max(0, (num_frames - 1) // time) * time + 1
            near = " or ".join(str(n) for n in dict.fromkeys((low, max(1, low + (time if num_frames >= 1 else 0)))))
            raise ValueError(f"num_frames must be {time}k+1 for {self.name} (got {num_frames}); use {near}.")
        step = math.lcm(space * self.patch, multiple)
        for label, size in (("height", height), ("width", width)):
            if size < step or size % step:
                low = max(step, size // step * step)
                near = " or ".join(str(n) for n in dict.fromkeys((low, low + step if size > step else low)))
                raise ValueError(f"{label} must be a multiple of {step} for {self.name} (got {size}); use {near}.")
        token = space * self.patch
        return VideoGrid(self.latent_frames(num_frames), height // token, width // token)


@dataclass(frozen=True)
class Case:
    """One model at one size: `layout()` is the sequence its self-attention sees."""

    model: ModelSpec
    num_frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """Model and pixel size."""
        return f"{self.model.name} {self.height}x{self.width}x{self.num_frames}"

    @property
    def grid(self) -> VideoGrid:
        """The token grid."""
        return self.model.grid(self.num_frames, self.height, self.width)

    def layout(self) -> TokenLayout:
        """The sequence of self-attention, every text token valid."""
        return TokenLayout(self.grid, self.model.text)


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("wan2.1-1.3b", "wan", "wan2.1", 30, 12, 128, (4, 8), ffn=8960),
        ModelSpec("wan2.1-14b", "wan", "wan2.1", 40, 40, 128, (4, 8), ffn=13824),
        ModelSpec("wan2.2-a14b", "wan", "wan2.2-a14b", 40, 40, 128, (4, 8), ffn=13824, experts=2),
        ModelSpec("wan2.2-5b", "wan", "wan2.2-5b", 30, 24, 128, (4, 16), ffn=14336),
        ModelSpec("hunyuan-video", "hunyuan_video", "hunyuan-video", 60, 24, 128, (4, 8), text=256),
        ModelSpec("mochi", "mochi", "mochi", 48, 24, 128, (6, 8), text=256),
        ModelSpec("tiny-wan", "wan", "wan2.1", 8, 4, 64, (4, 4)),
    )
}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(MODELS["wan2.1-1.3b"], 81, 480, 832),
        Case(MODELS["wan2.1-14b"], 81, 480, 832),
        Case(MODELS["wan2.1-14b"], 69, 768, 1280),
        Case(MODELS["wan2.1-14b"], 81, 720, 1280),
        Case(MODELS["wan2.1-14b"], 161, 720, 1280),
        Case(MODELS["wan2.1-14b"], 321, 720, 1280),
        Case(MODELS["wan2.2-a14b"], 81, 720, 1280),
        Case(MODELS["wan2.2-5b"], 121, 704, 1280),
        Case(MODELS["hunyuan-video"], 129, 720, 1280),
        Case(MODELS["hunyuan-video"], 509, 720, 1280),
        Case(MODELS["mochi"], 163, 480, 848),
        Case(MODELS["tiny-wan"], 33, 128, 128),
        Case(MODELS["tiny-wan"], 81, 128, 128),
        Case(MODELS["tiny-wan"], 321, 128, 128),
        Case(MODELS["tiny-wan"], 81, 120, 136),
    )
}
