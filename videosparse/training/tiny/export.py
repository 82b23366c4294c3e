"""The exported pipeline, read back as a user would."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from videosparse.training.tiny.card import read_card, write_numbers
from videosparse.training.tiny.models import build_text_encoder, build_transformer, build_vae
from videosparse.training.tiny.objectives import FLOW_SHIFT
from videosparse.training.tiny.rounds import all_rounds, summary
from videosparse.training.tiny.state import Run
from videosparse.training.tiny.text import TEXT_LENGTH, wrap_tokenizer

logger = logging.getLogger(__name__)


def export(run: Run) -> Path:
    """Write the averaged weights as a WanPipeline in bf16, its card and its numbers."""
    out, sizes = Path(run.args.out), run.plan.sizes
    tokenizer = wrap_tokenizer(run.meta["tokenizer"])
    vae = build_vae(sizes, run.meta["latents_mean"], run.meta["latents_std"])
    transformer = build_transformer(sizes)
    text = build_text_encoder(sizes, len(tokenizer))
    run.load_into(vae, "vae.")
    run.load_into(transformer, "ema.transformer.")
    run.load_into(text, "ema.text.")
    for module in (vae, transformer, text):
        module.to(torch.bfloat16).eval()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        vae=vae,
        scheduler=make_scheduler(run.args.scheduler, run.args.flow_shift),
        transformer=transformer,
    )
    card = read_card(out)
    pipe.save_pretrained(out, safe_serialization=True, max_shard_size="11MB")
    plain_class_names(out)
    total = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    numbers = summary(all_rounds(run.meta)) | run.numbers | {"weights_mb": round(total / 1e6, 2)}
    numbers["flow_shift"] = run.args.flow_shift
    numbers["parameters"] = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("vae", vae), ("transformer", transformer), ("text_encoder", text))
    }
    write_numbers(out, numbers, card)
    logger.info(f"exported to {out}: {total / 1e6:.2f} MB of weights")
    if total > 20e6:
        raise ValueError(f"the weights must stay under 20 MB (got {total / 1e6:.2f} MB); use fewer or thinner layers.")
    return out


def make_scheduler(name: str, shift: float = FLOW_SHIFT) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """UniPC as Wan itself uses it (second order, best at few steps), or Euler; a larger shift is for more noise."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def plain_class_names(out: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it."""
    for path in (out / "model_index.json", out / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def check(run: Run, out: Path) -> None:
    """Load the exported folder as a user would and generate one clip."""
    pool = next(pool for pool in run.plan.pools if pool.name == run.plan.sample_pool)
    pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    start = time.monotonic()
    video = pipe(
        "a red circle bounces on a plain dark background",
        height=pool.size,
        width=pool.size,
        num_frames=pool.frames,
        num_inference_steps=run.args.check_steps,
        guidance_scale=4.0,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    logger.info(f"check: {tuple(video.shape)}, mean {video.float().mean():.3f}, {time.monotonic() - start:.1f} s")
    if not torch.isfinite(video).all():
        raise FloatingPointError("the exported pipeline generated values that are not finite.")
