"""How long a run takes and what memory it needs, from a few measured rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from videosparse.cases import ModelSpec
from videosparse.generation.families import PIPELINE_FAMILIES, Parameters
from videosparse.generation.planning import GenerationPlan

BLOCK_ROWS = 128
"""Rows of the blocks that the rate of sparse attention was measured with."""
_TEXT, _TEXT_WIDTH, _FREQUENCIES = 512, 4096, 256
"""Of Wan: text tokens of cross-attention, their width, and numbers that a time is embedded as."""


@dataclass(frozen=True)
class Rates:
    """What a card reaches in whole models, in FLOP/s.

    Args:
        dense: self-attention by the fastest dense kernel, FlashAttention-3 or -4 on Hopper.
        sparse: by maps, on the blocks that are read, by `quant`; of integers with their quantization.
        rest: all else, counted as its matrix products: by (whether blocks are compiled, `linears`).
    """

    dense: float
    sparse: Mapping[str | None, float]
    rest: Mapping[tuple[bool, str], float]


RATES = {
    "NVIDIA H200": Rates(
        dense=650e12,
        sparse={None: 600e12, "int8": 720e12, "int8-fp8": 740e12},
        rest={(False, "none"): 520e12, (True, "none"): 590e12, (True, "fp8"): 950e12},
    )
}
"""By card. Those of Wan2.1-14B at 81 frames and of HunyuanVideo at 129, from the times of each part of a layer in
`assets/results/profile.csv`, and of eager blocks and "int8-fp8" from those of blocks in `models.csv`. That of "int8" is
of one call of today's kernel, since the profile has an older one: 40 heads of 128 channels x 75,600 tokens at density
0.25, right behind matrix products, quantization included, 718 TFLOP/s (column `tflops` of `attention.csv`, set
"forward wan2.1-14b 720x1280x81 integers", run 2026-11-23T23:24:53Z, commit 400c03c). Whole models of that commit
(`radial` and `radial-int8` of `models.csv`) make it 705, beside 600 in bf16. Runs of `models.csv`, of four models and
up to 509 frames, are met within 13 %, and forwards of sparse steps within 18 % (tests hold both to 20)."""


@dataclass(frozen=True)
class Estimate:
    """A run of the transformer, without text encoder and VAE.

    Args:
        gpu: what it is for.
        seconds: all steps; dense_seconds: the same with dense attention.
        dense_forward, sparse_forward: seconds of a forward of a dense and of a sparse step.
        weights: bytes on the GPU at once, in bfloat16, or layers as FP8: of all experts; of one where models are
            offloaded; of two of the largest layers and what is beside the layers where groups are.
        activations: bytes beside them at the peak of a forward.
    """

    gpu: str
    seconds: float
    dense_seconds: float
    dense_forward: float
    sparse_forward: float
    weights: float
    activations: float


def estimate(plan: GenerationPlan, gpu: str = "NVIDIA H200") -> Estimate | None:
    """What a run takes on a card that was measured; None where nothing was measured that tells.

    Rates are known of the published models, of our kernels, of maps with blocks of 128 query rows, and of scores as
    they are; of FP8 linears in compiled blocks.
    """
    spec, rates = plan.source.spec, RATES[gpu]
    quant = plan.method.get("quant")
    sparse = None if quant is not None and not isinstance(quant, str) else rates.sparse.get(quant)
    rest = rates.rest.get((plan.compiled, plan.linears))
    products = _products(spec)
    if sparse is None or rest is None or products is None or plan.logit is not None:
        return None
    if plan.block is not None and plan.block[0] != BLOCK_ROWS:
        return None
    if plan.method.get("backend", "auto") not in ("auto", "triton"):
        return None
    # a dense processor takes integers everywhere, a sparse one in sparse calls
    dense = rates.dense if plan.block is not None or quant is None else sparse
    around = 2.0 * plan.layout.length * products * spec.layers / rest
    attention = plan.dense_flops / plan.forwards
    first_layers = plan.dense_layers / spec.layers
    dense_forward = around + attention / dense
    sparse_forward = around + attention * (first_layers / dense + (1 - first_layers) * plan.density / sparse)
    calls = plan.steps * plan.forwards
    share = _dense_share(plan)
    work = plan.dense_run_flops
    return Estimate(
        gpu=gpu,
        # searches run at the rate of dense attention
        seconds=calls * around + work * ((share + plan.search) / dense + (plan.average_density - share) / sparse),
        dense_seconds=calls * (around + attention / rates.dense),
        dense_forward=dense_forward,
        sparse_forward=dense_forward if plan.block is None else sparse_forward,
        weights=_resident(spec, plan.offload) * (1 if plan.linears == "fp8" else 2),
        activations=2 * spec.heads * spec.head_dim * plan.layout.length * _vectors(plan),
    )


def _dense_share(plan: GenerationPlan) -> float:
    """Share of the run's attention calls that are dense."""
    if plan.block is None:
        return 1.0
    return plan.schedule.average_density(0.0, plan.steps, plan.source.spec.layers)


def _products(spec: ModelSpec) -> float | None:
    """Multiply-adds of a token in a layer beside self-attention; None where the widths are not known.

    Projections of self-attention and the feed-forward layers; Wan's cross-attention, too. Layers of HunyuanVideo and
    Mochi have as many, whether the feed-forward layers are four times as wide, gated, or beside attention.
    """
    width = spec.heads * spec.head_dim
    if spec.text:  # which attends with the video, so there is no cross-attention
        return 12.0 * width**2
    return 6.0 * width**2 + 2 * width * spec.ffn + 2 * _TEXT * width if spec.ffn else None


def parameters_of(spec: ModelSpec) -> Parameters:
    """Numbers in the weights of a transformer: those that were counted, else Wan's, from its widths."""
    known = PIPELINE_FAMILIES[spec.family].parameters
    if known is not None:
        return known
    width = spec.heads * spec.head_dim
    beside = (6 + 1 + 1) * width**2 + (_TEXT_WIDTH + _FREQUENCIES) * width  # modulation, time, text
    return Parameters(beside, ((spec.layers, 8 * width**2 + 2 * width * spec.ffn),))


def _resident(spec: ModelSpec, offload: str) -> float:
    """Numbers in the weights that are on the GPU at once."""
    parameters = parameters_of(spec)
    if offload == "group":  # a layer comes while the one before works
        return parameters.beside + 2 * parameters.largest
    return parameters.total * (1 if offload == "model" else spec.experts)


def _vectors(plan: GenerationPlan) -> float:
    """Vectors of the model's width that a token needs beside the weights."""
    spec = plan.source.spec
    fixed, more = plan.source.pipelines.vectors[plan.compiled, plan.linears]
    return fixed + more * (spec.ffn or 0) / (spec.heads * spec.head_dim)
