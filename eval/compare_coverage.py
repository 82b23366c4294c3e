"""Which blocks should Radial Attention keep: "majority" (the authors' rule) or "any"? Quality at equal density.

    python eval/compare_coverage.py --model assets/tiny-wan --output assets/results/radial_coverage.csv

Generates the same prompts and seeds dense and with Radial Attention over a range of decays, under both coverages, and
writes one row per (grid, coverage, decay): density, and PSNR and relative L1 of the latents against dense with 95 %
bootstrap intervals. The sparse runs use block (64, 64): frames of the embedded model are about 256 tokens. Sizes are
pixel sizes; 120x136 gives 255 tokens a frame, which divides by nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from videosparse import DenseProcessor, RadialProcessor, restore
from videosparse.metrics.fidelity import psnr

diffusers.utils.logging.disable_progress_bar()

DECAYS = (0.25, 1.0, 2.0, 4.0)
SIZES = ("81x128x128", "81x120x136", "81x168x184", "161x120x136")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/tiny-wan", help="a Diffusers folder")
    parser.add_argument("--prompts", default="eval/prompts/world64.json", help="list of {prompt, seed}")
    parser.add_argument("--count", type=int, default=32, help="prompts to use")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="framesxheightxwidth in pixels")
    parser.add_argument("--decays", nargs="+", type=float, default=DECAYS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dense-steps", type=int, default=2, help="first steps that stay dense")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("assets/results/radial_coverage.csv"))
    return parser.parse_args()


def generate(
    pipe: DiffusionPipeline, prompts: list[dict[str, Any]], size: str, args: argparse.Namespace
) -> torch.Tensor:
    """Latents fp32 [n, channels, frames, height, width] on the CPU."""
    frames, height, width = (int(n) for n in size.split("x"))
    parts = []
    for start in range(0, len(prompts), args.batch):
        some = prompts[start : start + args.batch]
        generators = [torch.Generator("cpu").manual_seed(int(p["seed"])) for p in some]
        out = pipe(
            [p["prompt"] for p in some], num_frames=frames, height=height, width=width, generator=generators,
            num_inference_steps=args.steps, guidance_scale=args.guidance, max_sequence_length=48, output_type="latent",
        )  # fmt: skip
        parts.append(out.frames.float().cpu())
    return torch.cat(parts)


def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Videos in [0, 1], [n, frames, 3, height, width], from latents as `output_type="latent"` gives them."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(pipe.vae.config.latents_mean).view(shape)
    std = torch.tensor(pipe.vae.config.latents_std).view(shape)
    videos = []
    for latent in (latents * std + mean).split(4):
        with torch.no_grad():
            pixels = pipe.vae.decode(latent.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0]
        videos.append((pixels.float().cpu() / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    return torch.cat(videos)


def interval(values: torch.Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (draws, len(values)), generator=rng)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def row_for(
    latents: torch.Tensor, videos: torch.Tensor, dense: torch.Tensor, dense_videos: torch.Tensor
) -> dict[str, Any]:
    """The figures of one setting against dense."""
    decibels = torch.stack([psnr(a, b).mean() for a, b in zip(videos, dense_videos, strict=True)])
    relative = (latents - dense).abs().flatten(1).mean(1) / dense.abs().flatten(1).mean(1)
    low, high = interval(decibels)
    l1_low, l1_high = interval(relative.double())
    return {
        "psnr_db": round(float(decibels.mean()), 3), "psnr_low": round(low, 3), "psnr_high": round(high, 3),
        "latent_l1": round(float(relative.mean()), 5), "l1_low": round(l1_low, 5), "l1_high": round(l1_high, 5),
    }  # fmt: skip


def machine() -> dict[str, str]:
    """Where and with what the rows were measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": gpu,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": done.stdout.strip(),
    }


def main() -> None:
    args = arguments()
    prompts = json.loads(Path(args.prompts).read_text())
    prompts = (prompts["prompts"] if isinstance(prompts, dict) else prompts)[: args.count]
    dtype = torch.bfloat16 if "cuda" in args.device else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for size in args.sizes:
        restore(pipe)
        pipe.set_attn_processor(DenseProcessor())
        dense = generate(pipe, prompts, size, args)
        dense_videos = decode(pipe, dense)
        reseeded = generate(pipe, [{**p, "seed": int(p["seed"]) + 1} for p in prompts], size, args)
        spread = row_for(reseeded, decode(pipe, reseeded), dense, dense_videos)
        common = {"size": size, "block": "64x64", "videos": len(prompts), "steps": args.steps, **machine()}
        rows.append({"coverage": "dense, other seed", "decay": "", "density": 1.0, **spread, **common})
        for coverage in ("majority", "any"):
            for decay in args.decays:
                start = time.perf_counter()
                processor = RadialProcessor(
                    decay=decay, coverage=coverage, block=(64, 64), first_steps=args.dense_steps, first_layers=0
                )
                pipe.set_attn_processor(processor)
                latents = generate(pipe, prompts, size, args)
                figures = row_for(latents, decode(pipe, latents), dense, dense_videos)
                density = round(processor.report().video_density, 4)
                rows.append({"coverage": coverage, "decay": decay, "density": density, **figures, **common})
                print(size, coverage, decay, density, figures, f"{time.perf_counter() - start:.1f} s", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
