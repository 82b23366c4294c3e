"""Which blocks should Radial Attention keep: "majority" (the authors' rule) or "any"? Error at equal density.

    python eval/compare_coverage.py

Rendered clips of the synthetic world go through the VAE of the embedded model and are noised to fixed levels; the
transformer predicts from each, dense and with Radial maps of both rules over a range of decays (block 64, every layer
sparse, no dense steps). One row of `assets/results/radial_coverage.csv` per (size, rule, decay): density, relative L2
of the prediction against the dense one, and by how much the error against the true velocity grows, with 95 % bootstrap
intervals over clips and levels. 120x136 pixels are 255 tokens a frame, which divides by nothing; 256 tokens are four
whole blocks.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.progress import track

from videosparse import RadialProcessor, restore, sparsify
from videosparse.benchmark.rows import environment, write_rows
from videosparse.generation import embedded_model_path
from videosparse.metrics.bootstrap import interval
from videosparse.synthetic.captions import caption
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import sample_scene

OUTPUT = Path(__file__).resolve().parents[1] / "assets/results/radial_coverage.csv"
DECAYS = (0.5, 1.0, 2.0, 4.0)
SIZES = ("81x128x128", "81x120x136", "33x248x264")
SIGMAS = (0.9, 0.6, 0.3)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="rendered clips a size")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="framesxheightxwidth in pixels")
    parser.add_argument("--decays", nargs="+", type=float, default=DECAYS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    return parser.parse_args()


Sample = dict[str, torch.Tensor]


@torch.no_grad()
def samples(pipe: DiffusionPipeline, size: str, args: argparse.Namespace) -> Iterator[Sample]:
    """Inputs of the transformer for every clip and noise level, and the true velocity under "target"."""
    frames, height, width = (int(n) for n in size.split("x"))
    rng = random.Random(size)
    noise_rng = torch.Generator().manual_seed(0)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(getattr(pipe.vae.config, f"latents_{n}")).view(shape) for n in ("mean", "std"))
    for _ in range(args.clips):
        scene = sample_scene(rng)
        video = render([scene], frames, height, width, device=args.device) * 2 - 1
        latent = (pipe.vae.encode(video).latent_dist.mode().cpu() - mean) / std
        text, _ = pipe.encode_prompt(caption(scene, rng), do_classifier_free_guidance=False, max_sequence_length=48)
        for sigma in SIGMAS:
            noise = torch.randn(latent.shape, generator=noise_rng)
            yield {
                "hidden_states": ((1 - sigma) * latent + sigma * noise).to(args.device),
                "timestep": torch.tensor([1000.0 * sigma], device=args.device),
                "encoder_hidden_states": text.to(args.device),
                "target": noise - latent,
            }


@torch.no_grad()
def predict(transformer: torch.nn.Module, sample: Sample) -> torch.Tensor:
    inputs = {name: value for name, value in sample.items() if name != "target"}
    return transformer(**inputs, return_dict=False)[0].cpu()


def figures(found: list[torch.Tensor], dense: list[torch.Tensor], inputs: list[Sample]) -> dict[str, Any]:
    """Errors of some predictions, with their intervals."""

    def loss(predictions: list[torch.Tensor]) -> torch.Tensor:
        errors = [(p - s["target"]).square().mean() for p, s in zip(predictions, inputs, strict=True)]
        return torch.stack(errors).double()

    relative = torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, dense, strict=True)]).double()
    growth = loss(found) / loss(dense) - 1
    row: dict[str, Any] = {}
    for name, values in (("relative_l2", relative), ("loss_growth", growth)):
        mean, low, high = interval(values.tolist())
        row |= {name: f"{mean:.4f}", f"{name}_low": f"{low:.4f}", f"{name}_high": f"{high:.4f}"}
    return row


def rows_of(
    pipe: DiffusionPipeline, size: str, args: argparse.Namespace, where: dict[str, str]
) -> Iterator[dict[str, Any]]:
    restore(pipe.transformer)
    inputs = list(samples(pipe, size, args))
    dense = [predict(pipe.transformer, s) for s in track(inputs, f"{size} dense")]
    for coverage in ("majority", "any"):
        for decay in args.decays:
            processor = RadialProcessor(
                decay=decay, coverage=coverage, block=(64, 64), sink=False, first_steps=0, first_layers=0
            )
            sparsify(pipe.transformer, processor)
            found = [predict(pipe.transformer, s) for s in track(inputs, f"{size} {coverage} decay {decay}")]
            yield {
                "size": size, "coverage": coverage, "decay": decay, "block": "64x64", "sink": False,
                "density": round(processor.report().video_density, 4), **figures(found, dense, inputs),
                "samples": len(inputs), "sigmas": " ".join(map(str, SIGMAS)), **where,
            }  # fmt: skip


def main() -> None:
    args = arguments()
    where = environment(args.commit)
    pipe = DiffusionPipeline.from_pretrained(embedded_model_path(), dtype=torch.float32).to(args.device)
    rows = [row for size in args.sizes for row in rows_of(pipe, size, args, where)]
    write_rows(args.output, rows)
    for row in rows:
        print({k: row[k] for k in ("size", "coverage", "decay", "density", "relative_l2", "loss_growth")})


if __name__ == "__main__":
    run_program(main)
