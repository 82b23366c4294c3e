"""How far integer attention is from exact attention: on queries, keys and values of a real model, and on hard ones.

    python eval/measure_integers.py                                            half a minute on a GPU
    python eval/measure_integers.py --device cpu --frames 9 --output rows.csv  without one: in plain torch

Every call of the embedded model (both branches of guidance, all layers) at four steps of one run is made again in each
kind of integers; "made" inputs are normally distributed but for what their name says, as real models are reported to
have it. Errors are relative, in the mean square, against attention in fp64 of the very same bf16 tensors, each head by
itself. One row of `assets/results/integer_errors.csv` per inputs and kind, over all calls and heads. Plain torch rounds
as the kernels do but for the weights that values are multiplied by, which stay fp32; the kernels round those to FP8.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from videosparse.attach import restore, sparsify, tracker_of
from videosparse.benchmark.rows import WHERE, environment, write_rows
from videosparse.generation import GenerationRequest, Settings
from videosparse.generation.running import call_arguments, load_pipeline
from videosparse.kernels import KernelOptions, attend
from videosparse.kernels.options import QUANTS
from videosparse.layout import TokenLayout, VideoGrid
from videosparse.policies.base import LayerPlan
from videosparse.processors import DenseProcessor

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "assets/results/integer_errors.csv"
PROMPT = "a red circle bounces and a blue square moves to the left"
STEPS, LOOKED_AT = 20, (0, 6, 13, 19)
TOKENS, HEADS = 4000, 4
COLUMNS = ("inputs", "quant", "tokens", "head_dim", "calls", "error", "error_worst", "cosine_worst", "limit", *WHERE)

LIMIT = 0.03
"""What a kind of integers is to stay below; larger errors are published all the same."""

Found = dict[tuple[str, str], list[torch.Tensor]]
"""By inputs and kind of integers: (error, cosine) [2, heads] of each call."""


def judge(found: Found, inputs: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout) -> None:
    """Add the errors of one call on bf16 tensors [B, L, H, D] without padding."""
    exact = KernelOptions(backend="torch")
    truth = attend(q.double(), k.double(), v.double(), layout=layout, options=exact)
    for quant in filter(None, QUANTS):
        out = attend(q, k, v, layout=layout, options=KernelOptions(quant=quant)).double()
        by_head = [x.transpose(1, 2).flatten(2) for x in (out, truth)]
        error = (by_head[0] - by_head[1]).norm(dim=2) / by_head[1].norm(dim=2)
        cosine = torch.nn.functional.cosine_similarity(*by_head, dim=2)
        found[inputs, quant].append(torch.stack((error.flatten(), cosine.flatten())).cpu())


def made(device: torch.device, tokens: int, head_dim: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(name, q, k and v) of inputs that are hard in one way each."""
    draw = torch.Generator().manual_seed(0)
    shape = 1, tokens, HEADS, head_dim
    q, k, v = (torch.randn(shape, generator=draw) for _ in range(3))
    channels = torch.rand(HEADS, head_dim, generator=draw) < 0.1
    biased = channels * torch.randn(HEADS, head_dim, generator=draw)
    seldom = (torch.arange(tokens) % 97 == 0)[None, :, None, None]
    kinds = {
        "normal": (q, k, v),
        "scores close together": (0.2 * q, k, v),
        "scores far apart": (4 * q, k, v),
        "biased channels of keys": (q, k + 20 * biased, v),
        "large channels of values": (q, k, torch.where(channels, 30 * v, v)),
        "biased channels of values": (q, k, v + 10 * biased),
        "1 of 97 values 50 times as large": (q, k, torch.where(seldom, 50 * v, v)),
        "1 of 97 keys 8 times as large": (q, torch.where(seldom, 8 * k, k), v),
    }
    for name, tensors in kinds.items():
        yield f"{name}, head_dim {head_dim}", [x.to(device, torch.bfloat16) for x in tensors]


def real(found: Found, settings: Settings, steps: tuple[int, ...]) -> str:
    """Generate once with the embedded model, and judge the calls of some steps; returns what the inputs are called."""
    pipe, _ = load_pipeline(settings)
    name = f"the embedded model, {settings.num_frames} frames"
    sparsify(pipe, DenseProcessor())
    tracker = tracker_of(pipe.transformer)

    def core(original: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        if tracker.session.clock.index in steps:
            judge(found, name, *(x.bfloat16() for x in (q, k, v)), layout=plan.layout)
        out: torch.Tensor = original(q, k, v, plan)
        return out

    for _, layer in tracker.layers:
        vars(layer)["core"] = partial(core, layer.core)
    try:
        pipe(**{**call_arguments(settings), "output_type": "latent"})
    finally:
        restore(pipe)
    return name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", type=int, default=128, help="height and width of the embedded model's video")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of made inputs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    if args.output == OUTPUT and not args.device.startswith("cuda"):
        parser.error(f"errors without a GPU are not those of the kernels; give another --output than {OUTPUT}.")
    device, where = torch.device(args.device), environment(args.commit)
    found, tokens = defaultdict[tuple[str, str], list[torch.Tensor]](list), {}
    with torch.inference_mode():
        for head_dim in (64, 128):
            for name, qkv in made(device, args.tokens, head_dim):
                tokens[name] = args.tokens, head_dim
                judge(found, name, *qkv, layout=TokenLayout(VideoGrid(1, 1, args.tokens)))
        settings = GenerationRequest(
            PROMPT, method="dense", num_frames=args.frames, height=args.size, width=args.size, steps=args.steps,
            device=args.device,
        ).resolve()  # fmt: skip
        looked_at = LOOKED_AT if args.steps == STEPS else (args.steps - 1,)
        tokens[real(found, settings, looked_at)] = settings.grid.tokens, settings.source.spec.head_dim
    rows = []
    for (inputs, quant), calls in found.items():
        error, cosine = torch.cat(calls, 1)
        sizes = dict(zip(("tokens", "head_dim"), tokens[inputs], strict=True))
        rows.append(
            {
                "inputs": inputs, "quant": quant, **sizes, "calls": len(calls), "error": f"{error.mean():.4f}",
                "error_worst": f"{error.max():.4f}", "cosine_worst": f"{cosine.min():.6f}", "limit": LIMIT, **where,
            }
        )  # fmt: skip
        over = "" if error.mean() <= LIMIT else f"  above {LIMIT:.0%}"
        print(f"{inputs:52} {quant:10} {error.mean():7.2%} {error.max():7.2%} {cosine.min():9.6f}{over}", flush=True)
    write_rows(args.output, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    run_program(main)
