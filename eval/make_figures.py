"""Draw the figures of the README from the embedded model.

    python eval/make_figures.py

Writes `assets/figures/dense_vs_radial.png`: frames of the same prompts and seeds, dense above Radial Attention, with
the densities and the PSNR between the two in `assets/results/figure_dense_vs_radial.csv`; and
`assets/figures/radial_map.png`, the block map of Wan2.1-14B at 720x1280x161.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import csv
from pathlib import Path

import torch
from PIL import Image

from videosparse.cases import CASES
from videosparse.generation import Comparison, GenerationRequest, compare
from videosparse.generation.running import load_pipeline
from videosparse.generation.video import to_uint8
from videosparse.processors import RadialProcessor

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a red circle bounces on a checker background",
    "a blue square stands still on a striped background",
    "a green triangle orbits on a flat light background",
)


def strip(video: torch.Tensor, count: int = 8) -> torch.Tensor:
    """uint8 [height, count * width, 3]: frames of a video [F, 3, H, W] in [0, 1], evenly spaced."""
    picks = torch.linspace(0, len(video) - 1, count).round().long()
    return torch.cat(list(to_uint8(video[picks])), 1)


def stack(comparisons: list[Comparison]) -> torch.Tensor:
    """uint8 [rows, columns, 3]: dense above sparse for each prompt, a white line between prompts."""
    rows: list[torch.Tensor] = []
    for made in comparisons:
        rows += [strip(made.dense.frames), strip(made.sparse.frames)]
        rows.append(torch.full((6, rows[-1].shape[1], 3), 255, dtype=torch.uint8))
    return torch.cat(rows[:-1])


def row_of(prompt: str, made: Comparison) -> dict[str, object]:
    report = made.sparse.report
    values = {row.metric: row.value for row in made.fidelity}
    return {
        "prompt": prompt, "frames": report.grid.frames * 4 - 3, "grid": str(report.grid), "steps": report.steps,
        "video_density": round(report.video_density, 4), "average_density": round(report.average_density, 4),
        "psnr_db": round(values["psnr"], 2), "ssim": round(values["ssim"], 4),
        "convention": made.fidelity[0].convention,
        "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    (ROOT / "assets/figures").mkdir(parents=True, exist_ok=True)
    case = CASES["wan2.1-14b 720x1280x161"]
    RadialProcessor().resolve(case.model).policy.block_map(case.layout()).save_png(
        ROOT / "assets/figures/radial_map.png", size=577
    )
    requests = [GenerationRequest(p, num_frames=args.frames, steps=args.steps, seed=7) for p in PROMPTS]
    pipe, _ = load_pipeline(requests[0].resolve())
    made = [compare(request, pipe=pipe) for request in requests]
    Image.fromarray(stack(made).numpy()).quantize(128).save(ROOT / "assets/figures/dense_vs_radial.png", optimize=True)
    rows = [row_of(p, m) for p, m in zip(PROMPTS, made, strict=True)]
    with (ROOT / "assets/results/figure_dense_vs_radial.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_program(main)
