"""What generation has to know of a model family: its pipelines, what they are called with, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

Vectors = Mapping[tuple[bool, str], tuple[float, float]]
"""(vectors, more of them) by (whether blocks are compiled, `linears`), see `PipelineFamily.vectors`."""


class Guidance(StrEnum):
    """How a pipeline follows a prompt more closely."""

    CALLS = "calls"
    """A second call of the transformer in every step, for the negative prompt."""
    BATCH = "batch"
    """The same, both branches in one batch."""
    EMBEDDED = "embedded"
    """The scale is an input of a transformer that was distilled to need no second branch."""


class Rotary(StrEnum):
    """Where rotary embeddings come from."""

    TABLE = "table"
    """A table of as many positions as the configuration says."""
    COMPUTED = "computed"
    """Computed for any length."""
    LEARNED = "learned"
    """Computed from frequencies that are weights."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers are in the weights of a transformer.

    Args:
        beside: beside its layers: embeddings, modulation by time.
        layers: of each kind of layer, how many there are and the numbers in one.
    """

    beside: float
    layers: tuple[tuple[int, float], ...]

    @property
    def total(self) -> float:
        """All of them."""
        return self.beside + sum(count * size for count, size in self.layers)

    @property
    def largest(self) -> float:
        """Those of the largest layer."""
        return max(size for _, size in self.layers)


@dataclass(frozen=True)
class PipelineFamily:
    """The facts of one family that no configuration file gives.

    Args:
        name: as in `videosparse.models.FAMILIES`; title: for people.
        pipeline: the class that makes a video from a prompt alone.
        others: classes that need more than that, and what.
        usual: the published model, of `sources.DEFAULTS`, whose settings suit one that is not published.
        guidance, rotary: see there.
        layers: which numbers of the transformer's configuration count its layers.
        text: tokens that attend with the video; 0 where they are only attended to.
        vae: class of its VAE.
        vae_strides: which numbers of its configuration are its compression of time and space, or these themselves.
        vae_float32: whether it loses detail below fp32; vae_tiles: whether whole videos do not fit through it.
        multiple: heights and widths that the pipeline takes are multiples of this, whatever the model's own step.
        least_steps: fewest steps that its scheduler takes.
        halves: whether noise levels fall by little in the first half of a run and by ever more in the second; else
            they fall evenly before the scheduler's shift.
        parameters: of the published transformer; None reckons them from the widths.
        vectors: vectors of the model's width that a token needs at the peak of a forward, and more of them for each
            time that Wan's feed-forward layers are as wide as the model: peaks of `assets/results/models.csv` less the
            weights there.
    """

    name: str
    title: str
    pipeline: str
    others: Mapping[str, str]
    usual: str
    guidance: Guidance
    rotary: Rotary
    layers: tuple[str, ...]
    text: int
    vae: str
    vae_strides: tuple[str, str] | tuple[int, int]
    vae_float32: bool
    vae_tiles: bool
    multiple: int
    vectors: Vectors
    parameters: Parameters | None = None
    least_steps: int = 1
    halves: bool = False


_WAN = PipelineFamily(
    name="wan",
    title="Wan",
    pipeline="WanPipeline",
    others=MappingProxyType({
        "WanImageToVideoPipeline": "an image",
        "WanVideoToVideoPipeline": "a video",
        "WanVACEPipeline": "a video or masks",
    }),
    usual="wan2.1-1.3b",
    guidance=Guidance.CALLS,
    rotary=Rotary.TABLE,
    layers=("num_layers",),
    text=0,
    vae="AutoencoderKLWan",
    vae_strides=("scale_factor_temporal", "scale_factor_spatial"),
    vae_float32=True,
    vae_tiles=False,
    multiple=16,
    vectors=MappingProxyType({(False, "none"): (6.6, 1.72), (True, "none"): (5.05, 0.81), (True, "fp8"): (2.4, 1.6)}),
)  # fmt: skip

_HUNYUAN_VIDEO = PipelineFamily(
    name="hunyuan_video",
    title="HunyuanVideo",
    pipeline="HunyuanVideoPipeline",
    others=MappingProxyType({"HunyuanVideoImageToVideoPipeline": "an image"}),
    usual="hunyuan-video",
    guidance=Guidance.EMBEDDED,
    rotary=Rotary.COMPUTED,
    layers=("num_layers", "num_single_layers"),
    text=256,
    vae="AutoencoderKLHunyuanVideo",
    vae_strides=("temporal_compression_ratio", "spatial_compression_ratio"),
    vae_float32=False,
    vae_tiles=True,
    multiple=16,
    parameters=Parameters(0.3607e9, ((20, 0.33983e9), (40, 0.14159e9))),  # with two streams, with one
    vectors=MappingProxyType({(False, "none"): (16.3, 0), (True, "none"): (11.3, 0), (True, "fp8"): (14.4, 0)}),
)

_MOCHI = PipelineFamily(
    name="mochi",
    title="Mochi",
    pipeline="MochiPipeline",
    others=MappingProxyType({}),
    usual="mochi",
    guidance=Guidance.BATCH,
    rotary=Rotary.LEARNED,
    layers=("num_layers",),
    text=256,
    vae="AutoencoderKLMochi",
    vae_strides=(6, 8),
    vae_float32=False,
    vae_tiles=True,
    multiple=1,
    parameters=Parameters(0.0986e9, ((47, 0.20764e9), (1, 0.16989e9))),  # the last drops its text
    vectors=MappingProxyType({(False, "none"): (17.8, 0), (True, "none"): (12.2, 0), (True, "fp8"): (11.6, 0)}),
    least_steps=2,  # its scheduler divides by the number of steps after the first
    halves=True,
)

PIPELINE_FAMILIES: Mapping[str, PipelineFamily] = MappingProxyType({
    family.name: family for family in (_WAN, _HUNYUAN_VIDEO, _MOCHI)
})  # fmt: skip


def family_of_pipeline(class_name: str) -> PipelineFamily | None:
    """The family of a pipeline class, None when it is not known."""
    return next((f for f in PIPELINE_FAMILIES.values() if class_name == f.pipeline or class_name in f.others), None)
