"""A phase of its own: the VAE's decoder is trained on by itself, for instance beside the DiT.

Encoder, latents and their statistics stay, so what is learned here fits a DiT that is trained on those latents at the
same time on another GPU. `export` puts both together.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videosparse.training.tiny.checkpoint import read_backup
from videosparse.training.tiny.models import build_vae
from videosparse.training.tiny.objectives import decoder_loss
from videosparse.training.tiny.optimizing import Progress
from videosparse.training.tiny.parallel_vae import ParallelVae
from videosparse.training.tiny.pools import gather, render_uint8, submit, to_video
from videosparse.training.tiny.state import Run
from videosparse.training.tiny.update import Update
from videosparse.training.tiny.vae_phase import (
    ClipStep,
    finish_vae,
    make_vae_optimizer,
    time_vae,
    vae_loop,
    vae_psnr,
    vae_seed,
    vae_warm_up,
)

# What is trained here; the rest of the VAE makes the latents.
DECODER = ("vae.decoder.", "vae.post_quant_conv.")
logger = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """Clips uint8 [N, 3, F, S, S], and their latents bf16 [N, C, T, h, w]."""

    clips: Tensor
    latents: Tensor


class DecoderStep(ClipStep):
    """A step of the decoder, on clips and their latents."""

    def __init__(self, run: Run, model: ParallelVae, update: Update, pairs: Pairs, batch: int) -> None:
        super().__init__(run, model, update, pairs.clips, batch)
        self.stored = pairs.latents
        self.latents = torch.zeros_like(pairs.latents[:batch])

    def _draw(self, index: Tensor) -> None:
        super()._draw(index)
        self.latents.copy_(self.stored[index])

    def _loss(self) -> Tensor:
        decoded = self.model.decode(self.latents.float())
        return decoder_loss(decoded, to_video(self.clips), self.run.args.vae_object_weight)


def train_decoder(run: Run, minutes: float) -> bool:
    """Train the decoder on the latents of a finished VAE; true when it is finished.

    Raises:
        ValueError: the VAE is not finished.
    """
    args = run.args
    begin_decoder(run)
    done = run.meta["decoder"]
    if done["finished"]:
        return True
    run.vae = build_vae(run.plan.sizes).to(run.device)
    run.load_into(run.vae, "vae.")
    run.ranks.reunite(list(run.vae.parameters()))
    finish_vae(run)
    pairs, held = make_pairs(run)

    def look() -> dict[str, float]:
        return vae_psnr(run, run.parallel, held)

    def keep(run: Run, progress: Progress, finished: bool) -> None:
        now = {"step": progress.step, "elapsed": progress.elapsed, "finished": finished, "minutes": run.spent()}
        run.meta["decoder"] |= now
        if run.ranks.first:
            run.meta["decoder"]["psnr"] = look()
        run.meta["phase"] = "decoder"
        run.set_tensors("vae.", run.vae)

    if "psnr_before" not in done:
        done["psnr_before"] = look()
        logger.info(f"decoder: begins at PSNR {done['psnr_before']} dB")
    done |= describe_decoder(run)
    parts = [run.vae.decoder, run.vae.post_quant_conv]
    for part in parts:
        part.requires_grad_(True)
    optimizer = make_vae_optimizer(run, parts)
    update = Update([p for part in parts for p in part.parameters()], [optimizer], run.ranks)
    progress = Progress(args.vae_steps, minutes, done["step"], done["elapsed"], warmup=100)
    size = run.plan.pools[-1].size
    steps = {size: DecoderStep(run, run.parallel, update, pairs, run.plan.decoder_batch)}
    vae_warm_up(run, steps, optimizer)
    if args.smoke:
        time_vae(run, steps, "decoder")
    vae_loop(run, optimizer, progress, steps, look, keep, "decoder")
    run.ranks.reunite(update.parameters)
    keep(run, progress, progress.fraction >= 1.0)
    logger.info(f"decoder: step {progress.step}, PSNR {run.meta['decoder'].get('psnr')} after {done['psnr_before']} dB")
    run.save()
    return progress.fraction >= 1.0


def begin_decoder(run: Run) -> None:
    """Keep of another run's state what the decoder needs, with a clock of its own, unless that has been done."""
    if "decoder" in run.meta:
        return
    if not run.meta.get("vae", {}).get("finished"):
        raise ValueError("decoder needs a finished VAE in what --restore names; wait until its run has saved one.")
    run.tensors = {name: tensor for name, tensor in run.tensors.items() if name.startswith("vae.")}
    run.meta = {name: run.meta[name] for name in ("sizes", "rounds", "vae") if name in run.meta}
    run.meta |= {"decoder": {"step": 0, "elapsed": 0.0, "finished": False}, "spent_before": 0.0}


def describe_decoder(run: Run) -> dict[str, Any]:
    """What the state and the model card tell of this phase, whatever its step."""
    how = f"{run.plan.pools[-1].frames} frames, objects weighing {1 + run.args.vae_object_weight:g} times as much"
    return {"lr": run.args.vae_lr, "how": how}


def make_pairs(run: Run) -> tuple[Pairs, dict[int, Tensor]]:
    """Clips as long as those that the DiT sees, with their latents; and the clips that the VAE was judged on.

    The latents are the means of the posteriors, rounded to bf16, because that is what the DiT learns to draw; the
    encoder does not change, so each is computed once.
    """
    plan = run.plan
    pool, (size, _) = plan.pools[-1], plan.vae_batches[-1]
    seed = vae_seed(run)
    # the first scenes of the VAE's largest pool, and others than it was trained on
    same = submit(run, seed + len(plan.vae_batches) - 1, plan.vae_check)
    futures = submit(run, seed + 300, plan.decoder_clips)
    held = render_uint8(run, gather(same)[0], plan.vae_frames, size)
    clips = render_uint8(run, gather(futures)[0], pool.frames, pool.size)
    latents = []
    with torch.no_grad(), run.autocast():
        for part in torch.split(clips, pool.chunk):
            latents.append(run.parallel.encode(to_video(part))[0].bfloat16())
    logger.info(f"decoder: {len(clips)} clips of {pool.frames} frames of {pool.size} pixels rendered and encoded")
    return Pairs(clips, torch.cat(latents)), {size: held}


def take_decoder(run: Run, folder: Path) -> None:
    """Put the decoder of another run's backup, and what its state tells, into a run whose latents it was trained on.

    Raises:
        FileNotFoundError: there is no backup.
        ValueError: it is no decoder's, it is one for other latents, or it is no better than what it began with.
    """
    if not (folder / "state.json").exists():
        raise FileNotFoundError(f"--decoder {folder} is not a backup of `decoder`: state.json is missing.")
    tensors, meta = read_backup(folder)
    if "decoder" not in meta:
        raise ValueError(f"--decoder {folder} is not a backup of `decoder` but of another command.")
    told = meta["decoder"]
    mine = {name: tensor for name, tensor in run.tensors.items() if name.startswith("vae.")}
    same = mine.keys() == tensors.keys() and all(
        name.startswith(DECODER) or torch.equal(mine[name], tensor) for name, tensor in tensors.items()
    )
    if not same:
        raise ValueError(
            f"--decoder {folder} was trained with another encoder than the VAE's in {run.backup}; take the one that "
            "began with this round's VAE, or leave --decoder out."
        )
    key = f"{run.plan.vae_batches[-1][0]}_objects"
    before, after = (told.get(name, {}).get(key, float("nan")) for name in ("psnr_before", "psnr"))
    if not after > before:
        raise ValueError(
            f"--decoder {folder} must draw objects better than the decoder that it began with (got {after} dB after "
            f"{before} dB on held-out clips); leave it out, or let its training end."
        )
    run.tensors |= {name: tensor for name, tensor in tensors.items() if name.startswith(DECODER)}
    run.meta["decoder"] = told | {"device": meta["device"]}
    run.numbers.update(vae_psnr=told["psnr"], vae_psnr_before_decoder=told["psnr_before"])
    logger.info(f"decoder of {folder}: {json.dumps(told)}")
