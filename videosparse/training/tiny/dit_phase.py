"""Last phase: train the DiT and the text encoder, stage by stage."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import random
import time
from functools import partial

import torch

from videosparse.training.tiny.dit import Dit
from videosparse.training.tiny.optimizing import Progress, Ticker, pick_attention, timed
from videosparse.training.tiny.plan import Plan, Shape
from videosparse.training.tiny.ranks import REUNITE_STEPS
from videosparse.training.tiny.rounds import describe_stages
from videosparse.training.tiny.state import Run

logger = logging.getLogger(__name__)


def train_dit(run: Run, minutes: float) -> bool:
    """Train the DiT and the text encoder; true when finished."""
    plan, args = run.plan, run.args
    done = run.meta.get("dit", {})
    if done.get("finished"):
        return True
    if args.scale_lr:
        scale_rates(args, run.ranks.size)
    progress = Progress(args.steps, minutes, done.get("step", 0), done.get("elapsed", 0.0), decay=args.decay_share)
    dit = Dit(run)
    cuda = run.device.type == "cuda"
    with contextlib.ExitStack() as stack:
        if cuda:
            from torch.nn.attention import sdpa_kernel

            order = pick_attention() if args.attention == "auto" else None
            if order:
                stack.enter_context(sdpa_kernel(order, set_priority=True))
            torch.cuda.empty_cache()
        if cuda and not args.no_compile:
            dit.compile()
        first_steps(run, dit)
        dit_loop(run, dit, progress)
    apart = run.ranks.reunite(dit.parameters)
    logger.info(f"dit: weights of {run.ranks.size} processes were {apart:.1e} apart")
    finished = progress.fraction >= 1.0
    if finished and run.ranks.first:
        run.numbers["held_out_loss"] = dit.evaluate()
        logger.info(f"dit: finished by {progress.ended_by} at step {progress.step}: {run.numbers['held_out_loss']}")
    if run.ranks.first:
        keep_dit(run, dit, progress)
        save_strip(run, dit, stage_of(plan, progress.fraction))
    return finished


def scale_rates(args: argparse.Namespace, processes: int) -> None:
    """Multiply the rates by the square root of the number of processes, as batches that much larger allow."""
    args.lr, args.matrix_lr = (rate * math.sqrt(processes) for rate in (args.lr, args.matrix_lr))


def first_steps(run: Run, dit: Dit) -> None:
    """Compute the gradients of every batch shape once, so that compilation and any failure come first."""
    shapes = list(dict.fromkeys(shape for _, shapes in run.plan.stages for shape in shapes))
    for shape in shapes:
        begin = time.monotonic()
        try:
            loss = dit.step(shape, learn=False).item()
        except Exception as error:
            if not dit.compiled:
                raise
            logger.warning(
                f"dit: {shape} failed when compiled, going on eagerly: {type(error).__name__}: {str(error)[:400]}"
            )
            dit.uncompile()
            loss = dit.step(shape, learn=False).item()
        logger.info(f"dit: {shape} first step {time.monotonic() - begin:.1f} s, loss {loss:.4f}")
    capture_steps(run, dit, shapes)
    dit.set_lr(0.0)
    for shape in shapes if run.device.type == "cuda" or run.args.smoke else ():
        seconds = timed(run.device, partial(dit.step, shape), 8 if run.device.type == "cuda" else 1)
        logger.info(
            f"TIMING dit {shape.pool} T={shape.latent_frames} batch {shape.batch}: {1e3 * seconds:.1f} ms a step"
        )
    if run.device.type == "cuda":
        logger.info(f"dit: peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def capture_steps(run: Run, dit: Dit, shapes: list[Shape]) -> None:
    """CUDA graphs of all steps; a single process goes on without graphs if that fails."""
    if run.device.type != "cuda" or run.args.no_graph:
        return
    begin = time.monotonic()
    try:
        dit.capture(shapes)
        logger.info(f"dit: CUDA graphs of {len(shapes)} shapes captured in {time.monotonic() - begin:.1f} s")
    except Exception as error:
        if run.ranks.size > 1:
            # the others may wait for a sum that this process never made
            raise
        logger.info(f"dit: graph capture failed, going on without: {type(error).__name__}: {str(error)[:400]}")
        dit.forget_graphs()
        torch.cuda.synchronize()


def dit_loop(run: Run, dit: Dit, progress: Progress) -> None:
    """Step until the phase or the call ends; the first process evaluates and saves between stages and now and then.

    All processes draw the same shapes, go by the clock of the first, and stop together; the others wait for the first
    in the next step.
    """
    plan, args, first = run.plan, run.args, run.ranks.first
    rng = random.Random(progress.step + 17)
    tick = Ticker("dit", progress)
    stage = stage_of(plan, progress.fraction)
    run.meta.setdefault("dit", {}).setdefault("steps_by_stage", {})
    counts = run.meta["dit"]["steps_by_stage"]
    average = None
    checked = saved = time.monotonic()
    while run.goes_on(progress):
        now = stage_of(plan, progress.fraction)
        if now != stage:
            if first:
                logger.info(f"dit: stage {stage} ended at step {progress.step}, held-out loss {dit.evaluate()}")
                keep_dit(run, dit, progress)
                counts = run.meta["dit"]["steps_by_stage"]
                save_strip(run, dit, stage)
            stage, average = now, None
        factor = progress.lr_factor()
        dit.set_lr(factor)
        shapes = plan.stages[stage][1]
        shape = rng.choices(shapes, [s.weight for s in shapes])[0]
        loss = dit.step(shape)
        average = loss.clone() if average is None else average.lerp(loss, 0.02)
        counts[str(stage)] = counts.get(str(stage), 0) + 1
        progress.advance()
        if progress.step % REUNITE_STEPS == 0:
            run.ranks.reunite(dit.parameters)
        tick(average, args.lr * factor, f"stage {stage}")
        # As in the VAE's loop: the host must not run far ahead of the device, or the clock means nothing.
        if progress.step % 10 == 0 and run.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if first and time.monotonic() - checked > args.check_seconds:
            logger.info(f"dit step {progress.step} held-out loss (sigma .3 .6 .8 .95) {dit.evaluate()}")
            checked = time.monotonic()
        if first and time.monotonic() - saved > args.save_seconds:
            keep_dit(run, dit, progress)
            counts = run.meta["dit"]["steps_by_stage"]
            saved = time.monotonic()


def stage_of(plan: Plan, fraction: float) -> int:
    """The stage in which a share of the phase falls."""
    return next((i for i, (end, _) in enumerate(plan.stages) if fraction < end), len(plan.stages) - 1)


def keep_dit(run: Run, dit: Dit, progress: Progress) -> None:
    """Copy the weights to the host and save everything."""
    counts = run.meta.get("dit", {}).get("steps_by_stage", {})
    run.meta["dit"] = {
        "step": progress.step,
        "elapsed": progress.elapsed,
        "finished": progress.fraction >= 1.0,
        "steps_by_stage": counts,
        "what": describe_stages(run.plan, counts),
        "how": describe_rates(run.args, run.ranks.size),
    }
    run.meta["phase"] = "dit"
    run.set_tensors("raw.transformer.", dit.transformer)
    run.set_tensors("raw.text.", dit.text)
    if dit.reader is not None:
        run.set_tensors("raw.reader.", dit.reader)
    run.set_tensors("ema.transformer.", dit.ema_transformer)
    run.set_tensors("ema.text.", dit.ema_text)
    run.save()


def describe_rates(args: argparse.Namespace, processes: int = 1) -> str:
    """Optimisers with their highest rates, and what else a reader needs to repeat the round."""
    rates = f"AdamW at {args.lr:.3g}"
    if args.optimizer == "muon":
        rates = f"Muon at {args.matrix_lr:.3g} for the matrices of the blocks, {rates} for the rest"
    scenes = f"two objects in {100 * args.pairs:g} % of scenes"
    if args.binding:
        scenes += f", motions read from the text with weight {args.binding:g}"
    if args.long_share is not None:
        scenes += f", the longest clips in {100 * args.long_share:g} % of batches"
    batches = f", gradients of {processes} processes" if processes > 1 else ""
    return f"{rates}, shift {args.shift:g}, weight of objects {args.object_weight:g}, {scenes}{batches}"


def save_strip(run: Run, dit: Dit, stage: int) -> None:
    """Frames of four samples, one row a clip; the stages are stacked in one PNG, which is kept small."""
    import numpy as np
    from PIL import Image

    try:
        start = time.monotonic()
        video, _ = dit.sample()
        frames = torch.linspace(0, video.shape[2] - 1, 5).round().long().tolist()
        rows = [torch.cat([clip[:, f] for f in frames], 2) for clip in video]
        image = torch.cat(rows, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        keep = run.work / "strips"
        keep.mkdir(parents=True, exist_ok=True)
        np.save(keep / f"{stage}.npy", image)
        stack = np.concatenate([np.load(path) for path in sorted(keep.glob("*.npy"))])
        run.backup.mkdir(parents=True, exist_ok=True)
        for colours in (128, 48, 16, 6):
            Image.fromarray(stack).quantize(colours).save(run.backup / "samples.png", optimize=True)
            if (run.backup / "samples.png").stat().st_size <= 200_000:
                break
        logger.info(f"dit: samples of stage {stage} in {run.backup / 'samples.png'}, {time.monotonic() - start:.1f} s")
    except Exception as error:
        logger.info(f"dit: no samples: {type(error).__name__}: {error}")
