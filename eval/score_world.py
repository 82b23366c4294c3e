"""Score videos of the synthetic world: what the prompt promised against what is there.

Generate the 64 fixed prompts with a pipeline, score them, write one row per video:

    python eval/score_world.py --model assets/tiny-wan --prompts eval/prompts/world64.json --frames 33 --steps 20 \\
        --guidance 4 --height 128 --width 128 --method dense --batch 16 --device auto --output dense.csv

The same with block-sparse attention, and the ceiling: the rendered truth of the same prompts through the model's VAE:

    python eval/score_world.py --model assets/tiny-wan --method radial --set radial.decay=0.5 --output radial.csv
    python eval/score_world.py --model assets/tiny-wan --through-vae --output ceiling.csv

Check the detectors themselves on rendered truth, sharp and degraded as by a VAE at 32 dB, with one and two objects:

    python eval/score_world.py --validate 400

Write the prompt lists again (the same seed gives the same files):

    python eval/score_world.py --make-prompts

128 prompts whose triples training never shows, a quarter of them of two objects, in under a minute on one H200:

    python eval/score_world.py --model assets/tiny-wan --prompts eval/prompts/world128_heldout.json --frames 81 \\
        --steps 50 --batch 32 --compile --output heldout_81_50.csv

`--seed-shift 1000` draws other noise for the same prompts: the spread of one method. `--save FOLDER` keeps the videos.
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor

from videosparse.benchmark.rows import write_rows
from videosparse.evaluation.detectors import QUESTIONS, check_scene
from videosparse.evaluation.prompt_lists import balanced, make_list, pairs_of
from videosparse.evaluation.prompts import Prompt, load_prompts
from videosparse.evaluation.work import workers
from videosparse.files import whole, write_text
from videosparse.generation.environment import choose_device
from videosparse.generation.output import WHOLE, check_place, check_writable, slug
from videosparse.generation.sources import find_model
from videosparse.metrics.bootstrap import interval
from videosparse.metrics.world import Score, WorldReport, analyse, score
from videosparse.mp4 import write_mp4
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, triples

FPS = 16.0
PROMPTS = Path(__file__).parent / "prompts"


def make_prompts() -> None:
    rng = random.Random(20)
    singles = make_list([(t,) for t in balanced(triples("train"), 64, rng)], 10_000, rng)
    save_list(PROMPTS / "world64.json", "one object, from the training triples", singles)
    hidden = triples("heldout")
    alone = make_list([(t,) for t in balanced(hidden, 96, rng)], 20_000, rng)
    pairs = make_list(pairs_of(hidden, 32, rng), 30_000, rng)
    save_list(PROMPTS / "world128_heldout.json", "96 of one object and 32 of two, from held-out triples", alone + pairs)
    rng = random.Random(21)
    pairs = make_list(pairs_of(triples("train"), 32, rng), 40_000, rng)
    save_list(PROMPTS / "world32_pairs.json", "two objects, from the training triples", pairs)


def save_list(path: Path, about: str, prompts: list[dict[str, Any]]) -> None:
    rows = ",\n".join("  " + json.dumps(p) for p in prompts)
    write_text(path, f'{{"about": {json.dumps(about)}, "prompts": [\n{rows}\n]}}\n')
    print(f"{path}: {len(prompts)} prompts, {about}")


def validate(args: argparse.Namespace) -> None:
    table = Table("objects", "video", *QUESTIONS, "permanence", "no switch", "centre, px")
    with workers(args.workers) as submit:
        for objects in (1, 2):
            for rough in (False, True):
                look = partial(check_scene, objects=objects, rough=rough, frames=args.frames, size=args.height)
                pending = [submit(look, seed) for seed in range(args.validate)]
                label = f"{objects} object(s), {'degraded' if rough else 'sharp'}"
                answers = [p.result() for p in track(pending, label)]
                shares = [f"{100 * np.mean([a[q] for a in answers]):.1f} %" for q in list(answers[0])[:-1]]
                off = np.nanmean([a["centre error, pixels"] for a in answers])
                table.add_row(str(objects), "degraded" if rough else "sharp", *shares, f"{off:.2f}")
    Console(width=160).print(table)


def look_at(video: Tensor) -> WorldReport:
    """What one video shows; runs in a worker, which must not take every core."""
    torch.set_num_threads(1)
    return analyse(video, fps=FPS)


def load_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline on its device, with the method's attention."""
    from diffusers import DiffusionPipeline

    device = str(choose_device(args.device))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipe = DiffusionPipeline.from_pretrained(find_model(args.model).location, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if args.method != "dense":
        from videosparse.generation.methods import make_processor, parse_overrides

        pipe.set_attn_processor(make_processor(args.method, parse_overrides(args.set).get(args.method)))
    if args.flow_shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=args.flow_shift)
    if args.compile:
        pipe.transformer.compile_repeated_blocks(dynamic=False)
    return pipe


@torch.inference_mode()
def generate(pipe: Any, prompts: Sequence[Prompt], args: argparse.Namespace) -> Tensor:
    """Videos of a batch of prompts, float32 [B, 3, F, H, W] on the CPU."""
    frames: Tensor = pipe(
        prompt=[p.prompt for p in prompts],
        num_frames=args.frames,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        max_sequence_length=args.text_length,
        generator=[torch.Generator("cpu").manual_seed(p.seed + args.seed_shift) for p in prompts],
        output_type="pt",
    ).frames
    return frames.transpose(1, 2).float().cpu()


@torch.inference_mode()
def through_vae(pipe: Any, prompts: Sequence[Prompt], args: argparse.Namespace) -> Tensor:
    """The truth of a batch of prompts, encoded and decoded, float32 [B, 3, F, H, W] on the CPU."""
    vae = pipe.vae
    truth = render([p.scene() for p in prompts], args.frames, args.height, args.width, device=vae.device)
    latents = vae.encode((truth * 2 - 1).to(vae.dtype)).latent_dist.mode()
    decoded: Tensor = vae.decode(latents).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()


def row_of(prompt: Prompt, result: Score, report: WorldReport, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the CSV."""
    expected = prompt.expected()
    seen = [d for d in result.detected if d]
    row: dict[str, Any] = {
        "prompt": prompt.prompt,
        "seed": prompt.seed + args.seed_shift,
        "method": "truth through VAE" if args.through_vae else args.method,
        "settings": " ".join([*args.set, *([f"flow_shift={args.flow_shift:g}"] if args.flow_shift else [])]),
        "frames": args.frames,
        "height": args.height,
        "width": args.width,
        "steps": args.steps,
        "guidance": args.guidance,
    }
    for name in ("colour", "shape", "motion"):
        row[f"{name}_expected"] = "+".join(str(getattr(e, name)) for e in expected.objects)
        row[f"{name}_detected"] = "+".join(getattr(d, name) if d else "none" for d in result.detected)
        row[f"{name}_right"] = int(bool(getattr(result, name)))
    row |= {"count_expected": expected.count, "count_detected": report.count, "count_right": int(result.count)}
    row |= {
        "background_expected": prompt.background,
        "background_detected": report.background,
        "background_right": int(bool(result.background)),
        "all_right_right": int(result.all_right),
        "permanence": f"{result.permanence:.4f}",
        "longest_gap": result.longest_gap,
        "switches": result.switches,
        "frozen": f"{report.frozen:.4f}",
    }
    for name in ("overlap", "residual", "colour_error", "jerk", "speed_variation", "radius"):
        row[name] = f"{np.mean([getattr(d, name) for d in seen]):.5f}" if seen else ""
    return row


def save_videos(folder: Path, prompts: Sequence[Prompt], videos: Tensor) -> None:
    """Write one mp4 per video, named by seed and prompt."""
    for prompt, video in zip(prompts, videos, strict=True):
        with whole(folder / f"{prompt.seed}-{slug(prompt.prompt, WHOLE)}.mp4") as part:
            write_mp4(part, video.transpose(0, 1), FPS)


def check_prompts(path: Path, prompts: Sequence[Prompt], needs_scenes: bool) -> None:
    """Raise ValueError where there is a prompt that cannot be judged; better now than after hours of videos."""
    for prompt in prompts:
        try:
            prompt.expected()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if needs_scenes and not prompt.of_world:
            raise ValueError(f"--through-vae renders scenes, which {path} has not; see {PROMPTS / 'world64.json'}.")


def score_model(args: argparse.Namespace) -> None:
    prompts = load_prompts(args.prompts)[: args.limit]
    check_prompts(args.prompts, prompts, args.through_vae)
    find_model(args.model).spec.grid(args.frames, args.height, args.width)  # Diffusers would round without a word
    check_place(args.output)
    if args.save:
        check_writable(args.save)
    pipe = load_pipeline(args)
    make = through_vae if args.through_vae else generate
    rows: list[dict[str, Any]] = []
    pending: list[tuple[Prompt, Future[WorldReport]]] = []
    with workers(args.workers) as submit:
        with Progress() as progress:
            bar = progress.add_task("generate", total=len(prompts))
            for at in range(0, len(prompts), args.batch):
                batch = prompts[at : at + args.batch]
                videos = make(pipe, batch, args)
                if args.save:
                    save_videos(args.save, batch, videos)
                pending += [(p, submit(look_at, video.clone())) for p, video in zip(batch, videos, strict=True)]
                progress.advance(bar, len(batch))
        for prompt, future in track(pending, "score"):
            report = future.result()
            rows.append(row_of(prompt, score(report, prompt.expected(), frames=args.frames), report, args))
    write_rows(args.output, rows)
    summarise(rows)
    print(f"{args.output}: {len(rows)} videos")


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Print the shares of right answers, overall with intervals and by class."""
    console = Console()
    overall = Table("question", "right", "95 % interval", title=f"{len(rows)} videos")
    for question in QUESTIONS:
        values = [row[f"{question}_right"] for row in rows]
        _, low, high = interval(values)
        name = "all of these" if question == "all_right" else question
        overall.add_row(name, f"{100 * np.mean(values):.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %")
    pairs = [row for row in rows if int(row["count_expected"]) == 2]
    for name, values in (
        ("permanence", [float(row["permanence"]) for row in rows]),
        ("binding, of two objects", [row["colour_right"] and row["shape_right"] for row in pairs]),
    ):
        if values:
            _, low, high = interval(values)
            overall.add_row(name, f"{100 * np.mean(values):.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %")
    console.print(overall)
    classes = Table("class", "videos", "colour", "shape", "motion", title="by class that the prompt names")
    for label, members in by_class(rows).items():
        shares = [f"{100 * np.mean([m[f'{q}_right'] for m in members]):.0f} %" for q in ("colour", "shape", "motion")]
        classes.add_row(label, str(len(members)), *shares)
    console.print(classes)


def by_class(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by every number of objects, colour, shape, motion and background that prompts name, in a fixed order."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["count_expected"])):
        groups[f"objects {row['count_expected']}"].append(row)
    for question, names in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("background", BACKGROUNDS)):
        for name in names:
            for row in rows:
                if name in row[f"{question}_expected"].split("+"):
                    groups[f"{question} {name}"].append(row)
    return groups


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", type=int, metavar="N", help="check the detectors on N scenes of each kind")
    parser.add_argument("--make-prompts", action="store_true", help="write eval/prompts/world*.json")
    parser.add_argument("--model", help="folder or name of the pipeline")
    parser.add_argument("--prompts", type=Path, default=PROMPTS / "world64.json")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--text-length", type=int, default=48, help="max_sequence_length; as the model was trained")
    parser.add_argument("--method", default="dense", help="a method of `videosparse`, or dense for no processor at all")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.OPTION=VALUE")
    parser.add_argument("--seed-shift", type=int, default=0, help="added to every seed of noise")
    parser.add_argument("--flow-shift", type=float, help="of the noise levels, instead of the scheduler's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compile the blocks; pays from about 20 videos on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--through-vae", action="store_true", help="score the truth through the model's VAE instead")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the videos as mp4")
    parser.add_argument("--output", type=Path, metavar="CSV")
    parser.add_argument("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="processes that score")
    args = parser.parse_args()
    if args.validate is None and not args.make_prompts and not (args.model and args.output):
        parser.error("give --model and --output, or --validate N, or --make-prompts")
    check_numbers(parser, args)
    return args


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would score nothing, or fail only once the model is loaded."""
    for name in ("validate", "limit", "steps", "text_length", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1 (got {value}).")
    if args.workers < 0:
        parser.error(f"--workers must be at least 0 (got {args.workers}).")
    if not math.isfinite(args.guidance):
        parser.error(f"--guidance must be a finite number (got {args.guidance}).")
    if args.flow_shift is not None and not 0 < args.flow_shift < math.inf:
        parser.error(f"--flow-shift must be a positive number (got {args.flow_shift}).")
    strange = [option for option in args.set if not option.startswith(f"{args.method}.")]
    if strange:
        parser.error(f"--set {strange[0]} is not of --method {args.method}; say {args.method}.OPTION=VALUE.")


def main() -> None:
    args = parse_args()
    if args.make_prompts:
        make_prompts()
    if args.validate:
        validate(args)
    if args.model:
        score_model(args)


if __name__ == "__main__":
    run_program(main, (ValueError, OSError))  # sizes, names and files
