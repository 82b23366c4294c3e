"""All sizes and amounts of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from videosparse.training.tiny.models import SMOKE_SIZES, TinySizes

# The last clips of every pool, which are never trained on.
HELD_OUT = 64


@dataclass(frozen=True)
class Clip:
    """A pool of latents: clips of `frames` pixel frames at `size` pixels; `chunk` are rendered and encoded at once."""

    name: str
    size: int
    frames: int
    count: int
    chunk: int


@dataclass(frozen=True)
class Shape:
    """One kind of training batch: the first `latent_frames` of clips of a pool, drawn with a relative weight."""

    pool: str
    latent_frames: int
    batch: int
    # how often it is drawn is no part of what it is: two stages share the compiled step of a shape
    weight: float = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """All sizes and amounts of a run."""

    sizes: TinySizes = field(default_factory=TinySizes)
    vae_clips: int = 6144
    vae_frames: int = 17
    vae_batches: tuple[tuple[int, int], ...] = ((64, 16), (128, 8))
    vae_check: int = 32
    # of the last pool's kind, for the decoder alone
    decoder_clips: int = 4096
    decoder_batch: int = 2
    pools: tuple[Clip, ...] = (
        Clip("64x33", 64, 33, 30720, 256),
        Clip("128x33", 128, 33, 20480, 64),
        Clip("128x81", 128, 81, 4096, 16),
    )
    stages: tuple[tuple[float, tuple[Shape, ...]], ...] = (
        (0.30, (Shape("64x33", 9, 128, 0.8), Shape("64x33", 1, 512, 0.2))),
        (0.85, (Shape("128x33", 9, 48, 0.75), Shape("128x33", 5, 80, 0.13), Shape("128x33", 1, 256, 0.12))),
        (1.00, (Shape("128x81", 21, 20, 0.6), Shape("128x33", 9, 48, 0.4))),
    )
    captions: int = 20000
    sample_pool: str = "128x33"
    sample_steps: int = 20
    eval_batch: int = 32


def smoke_plan(cuda: bool) -> Plan:
    """Seconds instead of minutes: on a GPU the real shapes with few clips, on a CPU small shapes."""
    full = Plan()
    if cuda:
        pools = tuple(replace(pool, count=max(2 * HELD_OUT, 2 * pool.chunk)) for pool in full.pools)
        return replace(full, vae_clips=256, decoder_clips=64, pools=pools, captions=2000)
    pools = (Clip("64x33", 16, 9, 12, 4), Clip("128x33", 32, 9, 12, 4), Clip("128x81", 32, 13, 12, 4))
    stages = (
        (0.30, (Shape("64x33", 3, 4, 0.8), Shape("64x33", 1, 4, 0.2))),
        (0.85, (Shape("128x33", 3, 2, 0.75), Shape("128x33", 2, 2, 0.13), Shape("128x33", 1, 2, 0.12))),
        (1.00, (Shape("128x81", 4, 2, 0.6), Shape("128x33", 3, 2, 0.4))),
    )
    return Plan(
        SMOKE_SIZES, 8, 9, ((16, 2), (32, 2)), 4, 8, 2, pools, stages, captions=300, sample_steps=2, eval_batch=4
    )


def large(plan: Plan) -> Plan:
    """The plan for weights that have seen 64 pixels: 128 pixels only, in two stages of fewer shapes."""
    _, (_, shapes), (_, last) = plan.stages
    stages = ((0.82, (replace(shapes[0], weight=0.85), replace(shapes[-1], weight=0.15))), (1.0, last))
    return replace(plan, pools=plan.pools[1:], stages=stages)


def short(plan: Plan) -> Plan:
    """The plan `large` without its longer clips, and half as many more of the others."""
    now = large(plan)
    pool = replace(now.pools[0], count=now.pools[0].count * 3 // 2)
    return replace(now, pools=(pool,), stages=((1.0, now.stages[0][1]),))


def long(plan: Plan) -> Plan:
    """The last stage of `large` alone."""
    now = large(plan)
    return replace(now, stages=((1.0, now.stages[-1][1]),))


def mixed(plan: Plan) -> Plan:
    """81 and 33 frames throughout, from one pool of 81 frames, four times the usual number of clips; 128 pixels only.

    The first frames of a clip are a clip, so nothing is encoded for the shorter ones alone. The VAE sees clips three
    times as long as usual: its convolutions look back over some 70 frames, of which 17 show little, and it lost some
    3 dB where a clip went on after those.
    """
    last = plan.pools[-1]
    pool = replace(last, count=4 * last.count)
    shapes = tuple(replace(shape, pool=pool.name, weight=0.5) for shape in plan.stages[-1][1])
    size, batch = plan.vae_batches[-1]
    return replace(
        plan,
        pools=(pool,),
        stages=((1.0, shapes),),
        sample_pool=pool.name,
        eval_batch=16,
        vae_frames=3 * plan.vae_frames - 2,
        vae_batches=((size, max(1, round(batch / 3))),),
    )


def with_long_share(plan: Plan, share: float) -> Plan:
    """The plan with its longest clips in a share of the batches of the last stage; others keep their ratios."""
    end, shapes = plan.stages[-1]
    longest = max(shape.latent_frames for shape in shapes)
    rest = sum(shape.weight for shape in shapes if shape.latent_frames != longest)
    weights = (share if s.latent_frames == longest else (1 - share) * s.weight / rest for s in shapes)
    last = tuple(replace(shape, weight=weight) for shape, weight in zip(shapes, weights, strict=True))
    return replace(plan, stages=(*plan.stages[:-1], (end, last)))


STAGES = {"full": lambda plan: plan, "large": large, "short": short, "long": long, "mixed": mixed}
