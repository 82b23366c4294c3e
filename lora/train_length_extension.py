"""Train a LoRA that lets a video model work at 2x to 4x its length, with sparse attention in training.

    python lora/train_length_extension.py lora/recipes/tiny-2x.toml                    a CPU and some minutes
    python lora/train_length_extension.py lora/recipes/wan2.1-14b-2x.toml --set data.path=data/wan-2x
    accelerate launch --num_processes 8 lora/train_length_extension.py RECIPE ...      several GPUs, or machines

`--set train.lr=2e-4` changes any key of the recipe, `--keys` lists them all. Encode a data set first with
`lora/prepare_dataset.py`; only the synthetic recipes do that by themselves. `--resume` goes on from the newest
checkpoint exactly as if nothing had happened (without one it says so and begins, so that a job that is queued again
needs one command); SIGTERM and Ctrl-C write one and leave. The result is `pytorch_lora_weights.safetensors` in
`output.folder`, for `pipe.load_lora_weights(...)` and for

    videosparse generate "a red circle bounces" --lora OUTPUT_FOLDER

which takes the length, the shift, and the options and schedule of the method from the file; the method is that of
`--method`, radial unless said. `--format comfy` also writes Wan's original keys.
"""

from __future__ import annotations

from videosparse.program import quiet_loading, run_program

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from videosparse.generation.errors import GenerationError, told
from videosparse.generation.output import check_writable
from videosparse.training.adapters import FORMATS, comfy_names, to_comfy
from videosparse.training.clips import Size, synthetic_clips
from videosparse.training.config import Config, ConfigError, describe, load_config
from videosparse.training.dataset import shards
from videosparse.training.encoding import prepare
from videosparse.training.run import Diverged, LoraRun, StepResult, make_accelerator, mean_of, quantile_text
from videosparse.training.validation import Validation

stopped_by: int | None = None


def main() -> int:
    args = arguments()
    if args.keys:
        for name, default, doc in describe():
            print(f"{name} = {default!r}\n    {doc}")
        return 0
    quiet_loading()
    try:
        return train(load_config(args.config, args.set), args)
    except GenerationError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        print(f"Error: {told(error)}; once that is mended, --resume goes on from the newest checkpoint.",
              file=sys.stderr)  # fmt: skip
        return 2


def train(config: Config, args: argparse.Namespace) -> int:
    engine = make_accelerator(config, args.device)
    folder = Path(config.output.folder)
    if engine.is_main_process:
        check_writable(folder)
    if not args.resume and (folder / "checkpoints").is_dir():
        raise GenerationError(f"{folder} has checkpoints; pass --resume, or choose another output.folder.")
    if config.data.synthetic:
        with engine.main_process_first():
            if engine.is_main_process:
                render_clips(config, str(engine.device))
    run = LoraRun(config, engine)
    if args.format == "comfy":
        comfy_names(run.about(), run.parameters)  # what it cannot hold is known before anything is trained
    begun = run.resume() if args.resume else 0
    run.cut_log()
    say = engine.print
    if args.resume and not begun:
        say(f"Note: {folder} has no checkpoint to resume; training starts at step 0.")
    say(f"{run.source.name}: {sum(p.numel() for p in run.parameters.values()):,} parameters in adapters, "
        f"{config.attention.method} attention, steps {begun} to {config.train.steps}")  # fmt: skip
    engine.init_trackers("videosparse-lora", config={name: str(value) for name, value, _ in flat(config)})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    videos = Validation(run) if config.validate.prompts else None
    first = validate(run, "before") if begun == 0 else {}
    if videos and begun == 0:
        videos.make()
    if run.pending:
        look(run, videos)
    clock = Clock(run)
    for step in run.remaining():
        try:
            result = run.train_step()
        except Diverged as error:
            run.save()
            raise GenerationError(f"{error} The state before is in {run.folder}/checkpoints.") from None
        clock.tell(result)
        if asked_to_stop(engine):
            say(f"Stopped after step {run.done}: {run.save(pending=True)} is written; --resume goes on from there.")
            engine.end_training()
            return 128 + (stopped_by or signal.SIGTERM)  # of a rank that was told by another
        look(run, videos)
        if run.done % config.output.save_every == 0 or step + 1 == config.train.steps:
            run.save()

    last = validate(run, "after")
    for path in videos.make() if videos else []:
        say(f"wrote {path}")
    folder = run.export()
    if args.format == "comfy" and engine.is_main_process:
        to_comfy(folder / "pytorch_lora_weights.safetensors", folder / "comfy.safetensors")
    for frames in first:
        say(f"{frames} frames: held-out loss {first[frames]:.4f} before, {last[frames]:.4f} after")
    say(f'LoRA in {folder}; try: videosparse generate "PROMPT" --lora {folder}')
    engine.end_training()
    return 0


def look(run: LoraRun, videos: Validation | None) -> None:
    """The held-out loss and the videos that are due after a step; the last step has its own."""
    every, video_every = run.config.validate.every, run.config.validate.video_every
    if run.done == run.config.train.steps:
        return
    if every and run.done % every == 0:
        validate(run, f"step {run.done}")
    if videos and video_every and run.done % video_every == 0:
        videos.make()


def validate(run: LoraRun, when: str) -> dict[int, float]:
    """Mean held-out loss of every length that is trained."""
    means = {}
    if run.config.data.holdout and run.config.validate.quantiles:
        with run.averaged():
            for frames in sorted(set(run.config.train.frames)):
                losses = run.held_out(frames)
                means[frames] = mean_of(losses.values())
                run.log({f"held_out/{frames}/{q:g}": loss for q, loss in losses.items()})
                run.accelerator.print(f"{when}: {frames} frames, held-out loss {quantile_text(losses)}", flush=True)
    return means


def render_clips(config: Config, device: str) -> None:
    """The data set of a synthetic recipe: clips of its longest length, which serve the others, too.

    One that is there stays as it is, unless its encoding was interrupted.

    Raises:
        ConfigError: what is there is of another size or number.
    """
    folder = Path(config.data.path)
    begun = folder / "unfinished"
    size = Size(max(config.train.frames), config.data.height, config.data.width)
    if (folder / "dataset.json").is_file() and not begun.is_file():
        check_clips(folder, size, config.data.synthetic)
        return
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun.touch()
    print(f"encoding {config.data.synthetic} synthetic clips of {size}", flush=True)
    clips = synthetic_clips(config.data.synthetic)
    names = ("train.frames", "data.height", "data.width", "data.fps")
    prepare(clips, folder, config.model.path, [size], fps=config.data.fps or None, names=names, device=device)
    begun.unlink()


def check_clips(folder: Path, size: Size, count: int) -> None:
    """Raise ConfigError where a data set that is there has not the clips that a recipe would make, or longer ones."""
    found = Counter()
    for _, there, clips in shards(folder):
        found[there] += len(clips)
    fits = [s for s in found if (s.height, s.width) == (size.height, size.width) and s.frames >= size.frames]
    if count not in [found[there] for there in fits]:
        has = " and ".join(f"{number} of {there}" for there, number in found.items()) or "none"
        raise ConfigError(
            f"The recipe asks for {count} synthetic clips of {size}, and {folder} has {has}; choose another data.path, "
            "or data.synthetic = 0 to train on what is there."
        )


class Clock:
    """Writes the log and prints a line now and then, with the time that is left."""

    def __init__(self, run: LoraRun) -> None:
        self.run, self.began, self.first = run, time.perf_counter(), run.done

    def tell(self, result: StepResult) -> None:
        """Log one step."""
        run, step = self.run, result.step
        left = (time.perf_counter() - self.began) / (run.done - self.first) * (run.config.train.steps - run.done)
        run.log({
            "loss": result.loss, "gradient": result.gradient, "lr": result.lr, "frames": step.frames,
            "dense": int(step.dense), "seconds": result.seconds, "tokens_per_second": result.tokens / result.seconds,
            "tflops": result.flops / result.seconds / 1e12, "peak_gib": (result.peak or 0) / 2**30,
            "seconds_left": left,
        })  # fmt: skip
        if run.done % run.config.output.log_every == 0 or run.done == 1:
            run.accelerator.print(
                f"step {run.done}/{run.config.train.steps} {step.frames} frames loss {result.loss:.4f} "
                f"gradient {result.gradient:.3f} {result.tokens / result.seconds:,.0f} tokens/s "
                f"{result.flops / result.seconds / 1e12:.2f} TFLOP/s {(result.peak or 0) / 2**30:.1f} GiB "
                f"{left / 60:.1f} min left",
                flush=True,
            )


def stop(number: int, frame: object) -> None:
    global stopped_by
    stopped_by = number


def asked_to_stop(engine) -> bool:
    """Whether any process was told to stop."""
    if engine.num_processes == 1:
        return stopped_by is not None
    flag = torch.tensor(float(stopped_by is not None), device=engine.device)
    return bool(engine.reduce(flag, "sum") > 0)


def flat(config: Config):
    for name, _, doc in describe():
        section, entry = name.split(".")
        yield name, getattr(getattr(config, section), entry), doc


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="a recipe, such as lora/recipes/tiny-2x.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a key")
    parser.add_argument("--keys", action="store_true", help="list all keys with their defaults, and leave")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"), help="cpu keeps off the GPU")
    parser.add_argument("--format", default="diffusers", choices=FORMATS, help="comfy writes comfy.safetensors, too")
    args = parser.parse_args()
    if args.config is None and not args.keys:
        parser.error("give a recipe, such as lora/recipes/tiny-2x.toml")
    return args


if __name__ == "__main__":
    run_program(main)
