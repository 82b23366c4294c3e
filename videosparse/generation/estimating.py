"""How long a run takes and what memory it needs, from a few measured rates."""

from __future__ import annotations

from dataclasses import dataclass

from videosparse.cases import ModelSpec
from videosparse.generation.planning import GenerationPlan

BLOCK_ROWS = 128
"""Rows of the blocks that the rate of sparse attention was measured with."""
_TEXT, _VECTORS, _EMBEDDINGS = 512, 11.4, 0.4e9
"""Of Wan: text tokens of cross-attention, vectors of the model's width that a token needs at the peak, and parameters
beside the layers (embeddings, modulation of time), of 14B; both read off `assets/results/models.csv`."""


@dataclass(frozen=True)
class Rates:
    """What a card reaches in whole models, eager, bfloat16, in FLOP/s.

    Args:
        dense: self-attention by our dense kernel.
        sparse: by maps, on the blocks that are read.
        rest: all else, counted as its matrix products.
    """

    dense: float
    sparse: float
    rest: float


RATES = {"NVIDIA H200": Rates(600e12, 620e12, 500e12)}
"""By card; fitted to `assets/results/models.csv`, whose rows they meet within 8 % (tests hold them to 20)."""


@dataclass(frozen=True)
class Estimate:
    """A run of the transformer, without text encoder and VAE.

    Args:
        gpu: what it is for.
        seconds: all steps; dense_seconds: the same with dense attention.
        weights: bytes of all experts in bfloat16.
        activations: bytes beside them at the peak of a forward.
    """

    gpu: str
    seconds: float
    dense_seconds: float
    weights: float
    activations: float


def estimate(plan: GenerationPlan, gpu: str = "NVIDIA H200") -> Estimate | None:
    """What a run takes on a card that was measured; None where nothing was measured that tells.

    Rates are known of Wan, of maps with blocks of 128 query rows, and of scores as they are.
    """
    spec = plan.source.spec
    if spec.family != "wan" or not spec.ffn or plan.logit is not None:
        return None
    if plan.block is not None and plan.block[0] != BLOCK_ROWS:
        return None
    rates = RATES[gpu]
    rest = _rest_flops(spec, plan.layout.length) * plan.forwards * plan.steps / rates.rest
    dense = plan.dense_run_flops / rates.dense
    return Estimate(
        gpu=gpu,
        seconds=rest + _dense_part(plan) / rates.dense + _sparse_part(plan) / rates.sparse,
        dense_seconds=rest + dense,
        weights=2 * spec.experts * _parameters(spec),
        activations=_VECTORS * 2 * spec.heads * spec.head_dim * plan.layout.length,
    )


def _dense_part(plan: GenerationPlan) -> float:
    """FLOPs of the run's dense attention, searches included, which run at its rate."""
    return plan.dense_run_flops * (_dense_share(plan) + plan.search)


def _sparse_part(plan: GenerationPlan) -> float:
    return plan.dense_run_flops * (plan.average_density - _dense_share(plan))


def _dense_share(plan: GenerationPlan) -> float:
    """Share of the run's attention calls that are dense."""
    if plan.block is None:
        return 1.0
    return plan.schedule.average_density(0.0, plan.steps, plan.source.spec.layers)


def _rest_flops(spec: ModelSpec, tokens: int) -> float:
    """Matrix products of a forward beside self-attention: projections, cross-attention, feed-forward layers."""
    width = spec.heads * spec.head_dim
    of_token = 6 * width**2 + 2 * width * spec.ffn + 2 * _TEXT * width
    return 2.0 * tokens * of_token * spec.layers


def _parameters(spec: ModelSpec) -> float:
    width = spec.heads * spec.head_dim
    return spec.layers * (8 * width**2 + 2 * width * spec.ffn) + _EMBEDDINGS * (width / 5120) ** 2
