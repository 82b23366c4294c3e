"""Videos longer than the embedded model was trained for: without training, and with length-extension LoRAs.

    python eval/score_lora_lengths.py --lora dense=outputs/lora/dense --lora radial=outputs/lora/radial

Each `--lora METHOD=FOLDER` is generated with the attention, schedule and shift that it was trained for; dense and
Radial Attention are run without a LoRA, too, and dense attention with RIFLEx, with UltraViCo, and by context windows of
the trained length. Every quarter of every video is judged as a video of its own by the detectors of the world (held-out
prompts, one object), beside the rendered truth; drift is what is right in the first quarter and wrong in the last,
repetition that beyond the true video's from half the training length on. Rows (means with 95 % bootstrap intervals) go
to `assets/results/lora_length.csv`, each as soon as it is there; the LoRAs' training time and memory come from their
logs. The same command goes on where it was stopped: rows that are there are not made again, but for a LoRA that has
been trained since. `eval/plot_lora_lengths.py` draws them. Several GPUs share the work by `--only`, each with an
--output of its own, whose rows are put together afterwards:

    python eval/score_lora_lengths.py --only none truth --output a.csv
    python eval/score_lora_lengths.py --only riflex ultravico windows --output b.csv
    python eval/score_lora_lengths.py --merge a.csv b.csv
"""

from __future__ import annotations

from videosparse.program import run_program

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videosparse import restore
from videosparse.benchmark.rows import WHERE, environment, read_rows, write_rows
from videosparse.generation.errors import GenerationError
from videosparse.generation.lora import find_lora
from videosparse.generation.methods import check_method, make_processor
from videosparse.generation.shifts import shifted
from videosparse.logits import FarLogits
from videosparse.metrics.bootstrap import interval
from videosparse.metrics.quarters import QUARTERS, drift, extra_repetition, quarters
from videosparse.stretching import context_windows, extend_rope
from videosparse.synthetic.captions import parse_caption
from videosparse.synthetic.render import render
from videosparse.synthetic.scene import arrange_scene

OUTPUT = Path("assets/results/lora_length.csv")
PROMPTS = Path("eval/prompts/world128_heldout.json")
FPS = 16.0
TRAINED = 81
OVERLAP = 16  # pixel frames that context windows share
STRETCHED = ("riflex", "ultravico", "windows")
# the schedule of the long lengths, for the runs without a LoRA
RADIAL = {"decay": 1.0, "first_steps": 0.1, "first_layers": 1}
FIGURES = (*(f"right_q{i + 1}" for i in range(QUARTERS)), "drift", "repetition", "permanence", "frozen")
KEY = ("lora", "method", "frames", "height", "width")
COLUMNS = (
    *KEY, "videos", "steps", "guidance",
    *(column for name in FIGURES for column in (name, f"{name}_low", f"{name}_high")),
    "generation_s", "training_steps", "training_s", "training_peak_gib", *WHERE,
)  # fmt: skip


def main() -> None:
    args = arguments()
    rows: list[dict[str, Any]] = list(read_rows(args.output, COLUMNS)) if args.output.is_file() else []
    if args.merge:
        for found in args.merge:
            rows = merged(rows, found)
        write_rows(args.output, rows, COLUMNS)
        print(f"{len(rows)} rows in {args.output}")
        return
    pipe = load(args)
    listed = json.loads(args.prompts.read_text())["prompts"]
    listed = [entry for entry in listed if len(entry["objects"]) == 1]
    started, left = time.monotonic(), 0
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for frames, limit in zip(args.frames, args.limit, strict=True):
            prompts = listed[:limit]
            for name, method, folder in settings_of(args):
                about = identity(name, method, folder, frames, len(prompts), args)
                if any(same(row, about) for row in rows):
                    continue
                if time.monotonic() - started > args.seconds:
                    left += 1
                    continue
                with switched(pipe, name, method, folder):
                    figures = measure(pipe, prompts, name, frames, pool, args)
                rows = merged(rows, [{**about, **figures, **environment(args.commit)}])
                write_rows(args.output, rows, COLUMNS)
                shown = ("lora", "method", "frames", *FIGURES, "generation_s")
                print({k: rows[-1].get(k) for k in shown}, flush=True)
    print(f"{len(rows)} rows in {args.output}" + (f"; {left} are left, call me again" if left else ""), flush=True)


def merged(rows: list[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, new ones instead of those of the same setting and size."""
    mine = {tuple(str(row[name]) for name in KEY) for row in new}
    return [*(row for row in rows if tuple(str(row[name]) for name in KEY) not in mine), *new]


def identity(
    name: str, method: str, folder: Path | None, frames: int, videos: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The columns that say what a row is of."""
    return {
        "lora": name, "method": method, "frames": frames, "height": args.size, "width": args.size, "videos": videos,
        "steps": args.steps, "guidance": args.guidance, **trained(folder),
    }  # fmt: skip


def same(row: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether a row is of this."""
    return all(str(row[name]) == str(value) for name, value in about.items())


def settings_of(args: argparse.Namespace) -> list[tuple[str, str, Path | None]]:
    """(name, method, LoRA) of what is compared; the truth first."""
    found: list[tuple[str, str, Path | None]] = [("truth", "none", None)]
    loras = [text.partition("=") for text in args.lora]
    methods = dict.fromkeys(["dense", "radial", *(method.split("-")[0] for method, _, _ in loras)])
    found += [*(("none", method, None) for method in methods), *((name, "dense", None) for name in STRETCHED)]
    found += [(method, method.split("-")[0], Path(folder)) for method, _, folder in loras]
    return [setting for setting in found if args.only is None or setting[0] in args.only]


def load(args: argparse.Namespace) -> Any:
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # the VAE is small, and loses detail below float32
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype={"default": dtype, "vae": torch.float32})
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def switched(pipe: Any, name: str, method: str, folder: Path | None) -> Iterator[None]:
    """A pipeline with a LoRA, or none, and the attention, for the time of a block."""
    options: dict[str, Any] = dict(RADIAL) if method == "radial" else {}
    shift = None
    windows = context_windows(pipe, frames=TRAINED, overlap=OVERLAP) if name == "windows" else nullcontext()
    try:
        if folder is not None:
            lora = find_lora(str(folder))
            if lora.norms is not None:
                raise SystemExit(f"{folder} has trained norms, which would stay for the others; it cannot be judged.")
            pipe.load_lora_weights(folder)
            options, shift = lora.options(method), lora.shift
            extend_rope(pipe, lora.about["rope"], trained_frames=lora.about["trained_frames"])
        if name == "riflex":
            extend_rope(pipe, "riflex", trained_frames=TRAINED)
        if method != "none":
            far = FarLogits((TRAINED - 1) // pipe.vae_scale_factor_temporal + 1) if name == "ultravico" else None
            pipe.set_attn_processor(make_processor(method, options, far))
        with shifted(pipe, shift), windows:
            yield
    finally:
        restore(pipe)
        pipe.unload_lora_weights()


def measure(
    pipe: Any, prompts: list[dict[str, Any]], name: str, frames: int, pool: ProcessPoolExecutor,
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Generate and judge all prompts at one length; the columns of what was found."""
    pending, seconds = [], 0.0
    for at in range(0, len(prompts), args.batch):
        part = prompts[at : at + args.batch]
        truths = true_videos(part, frames, args, pipe.device)
        begin = time.perf_counter()
        videos = truths if name == "truth" else generate(pipe, part, frames, args)
        seconds += time.perf_counter() - begin
        look = partial(judge, min_lag=TRAINED // 2 if frames > TRAINED else frames // 2)
        for entry, video, truth in zip(part, videos, truths, strict=True):
            pending.append(pool.submit(look, entry["prompt"], *((x * 255).byte().numpy() for x in (video, truth))))
    figures = [p.result() for p in pending]
    row: dict[str, Any] = {"generation_s": f"{seconds / len(prompts):.3f}"}
    for figure in FIGURES:
        mean, low, high = interval([f[figure] for f in figures])
        row |= {figure: f"{mean:.4f}", f"{figure}_low": f"{low:.4f}", f"{figure}_high": f"{high:.4f}"}
    return row


def true_videos(part: list[dict[str, Any]], frames: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    """[B, 3, F, H, W] on the CPU."""
    scenes = []
    for entry in part:
        objects = tuple((o["shape"], o["colour"], o["motion"]) for o in entry["objects"])
        scenes.append(arrange_scene(random.Random(entry["seed"]), objects, entry["background"]))
    return render(scenes, frames, args.size, args.size, device=device).clamp(0, 1).cpu()


@torch.inference_mode()
def generate(pipe: Any, part: list[dict[str, Any]], frames: int, args: argparse.Namespace) -> Tensor:
    """[B, 3, F, H, W] on the CPU."""
    video: Tensor = pipe(
        prompt=[entry["prompt"] for entry in part], num_frames=frames, height=args.size, width=args.size,
        num_inference_steps=args.steps, guidance_scale=args.guidance, max_sequence_length=48, output_type="pt",
        generator=[torch.Generator("cpu").manual_seed(entry["seed"]) for entry in part],
    ).frames  # fmt: skip
    return video.transpose(1, 2).float().cpu().clamp(0, 1)


def judge(prompt: str, video: np.ndarray, truth: np.ndarray, min_lag: int) -> dict[str, float]:
    """The figures of one video; runs in a worker."""
    torch.set_num_threads(1)
    shown, true = (torch.from_numpy(x).float() / 255 for x in (video, truth))
    found = quarters(shown, parse_caption(prompt), FPS)
    figures = {f"right_q{i + 1}": quarter.right for i, quarter in enumerate(found)}
    return figures | {
        "drift": drift(found),
        "repetition": extra_repetition(shown, true, min_lag),
        "permanence": float(np.mean([q.permanence for q in found])),
        "frozen": float(np.mean([q.frozen for q in found])),
    }


def trained(folder: Path | None) -> dict[str, Any]:
    """What training the LoRA took, from its log."""
    if folder is None or not (folder / "log.jsonl").is_file():
        return {}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    return {
        "training_steps": len(steps),
        "training_s": f"{sum(s['seconds'] for s in steps):.1f}",
        "training_peak_gib": f"{max(s['peak_gib'] for s in steps):.2f}",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="append", default=[], metavar="METHOD=FOLDER")
    parser.add_argument("--model", default="assets/tiny-wan")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--frames", type=int, nargs="+", default=[81, 161, 321])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--limit", type=int, nargs="+", default=[64], help="prompts; one number, or one a length")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row is begun after these")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="truth, none, a stretching, or METHOD of a --lora")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="CSV", help="measure nothing: put these into --output")
    parser.add_argument("--commit", help="of the code; asked of git unless given")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    try:
        args.merge = [read_rows(path, COLUMNS) for path in args.merge or ()]
    except ValueError as error:
        parser.error(str(error))
    if len(args.limit) not in (1, len(args.frames)):
        parser.error(f"--limit must be one number, or one for each of {len(args.frames)} lengths (got {args.limit}).")
    args.limit = args.limit * len(args.frames) if len(args.limit) == 1 else args.limit
    for text in args.lora:
        method, _, folder = text.partition("=")
        if not folder or not Path(folder).exists():
            parser.error(f"--lora must be METHOD=FOLDER with a folder that exists (got {text!r}).")
        try:
            check_method(method.split("-")[0])
        except GenerationError as error:
            parser.error(f"--lora {text}: {error}")
    known = ["truth", "none", *STRETCHED, *(text.partition("=")[0] for text in args.lora)]
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"--only must be of {', '.join(known)} (got {unknown[0]!r}).")
    return args


if __name__ == "__main__":
    run_program(main)
