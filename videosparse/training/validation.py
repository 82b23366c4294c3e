"""Validation videos: the pipeline around the very transformer that is trained, its other parts loaded when needed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videosparse.attach import sparsify
from videosparse.files import naming
from videosparse.generation.families import Guidance
from videosparse.generation.methods import make_processor
from videosparse.generation.shifts import shifted
from videosparse.generation.video import side_by_side, write_mp4
from videosparse.training.clips import check_size
from videosparse.training.encoding import load_parts
from videosparse.training.families import Text
from videosparse.training.run import LoraRun

FOLDER = "videos"
_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "pooled_projections": "pooled_prompt_embeds",
}


class Validation:
    """Makes the videos of `validate.prompts`, always from the same noise.

    The text encoder is loaded once, at the start, and let go; the VAE only for the time of a validation.

    Args:
        run: whose model it is.
    """

    def __init__(self, run: LoraRun) -> None:
        self.run, config = run, run.config.validate
        self.frames = config.frames or run.config.train.frames[-1]
        defaults = run.source.defaults
        self.height, self.width = config.height or defaults.height, config.width or defaults.width
        names = ("validate.frames", "validate.height", "validate.width")
        check_size(run.source, self.frames, self.height, self.width, names)
        self.before: list[Tensor] = []
        pipe = load_parts(run.source, run.accelerator.device, without=("transformer", "transformer_2", "vae"))
        length = defaults.max_sequence_length
        self.texts: list[Text] = [run.family.encode_text(pipe, [text], length) for text in config.prompts]
        self.negative = None
        if run.source.pipelines.guidance != Guidance.EMBEDDED and config.guidance > 1:
            self.negative = run.family.encode_text(pipe, [""], length)
        del pipe
        gc.collect()

    def make(self) -> list[Path]:
        """Write the videos as the LoRA is now; all processes must call.

        Raises:
            OSError: they cannot be written.
        """
        run = self.run
        sharded = run.config.train.sequence_parallel > 1 or run.accelerator.is_fsdp2
        videos: list[Tensor] = []
        if run.accelerator.is_main_process or sharded:
            with run.averaged():
                videos = self._videos()
            if not self.before:
                self.before = videos
        paths: list[Path] = []

        def write() -> None:
            paths.extend(self._write(f"step-{run.done:06d}-{n}", video) for n, video in enumerate(videos))
            if run.done:
                both = zip(self.before, videos, strict=True)
                paths.extend(self._write(f"before-after-{n}", side_by_side(a, b)) for n, (a, b) in enumerate(both))

        run.on_main(write)
        return paths

    def _videos(self) -> list[Tensor]:
        """[F, 3, H, W] in [0, 1] of each prompt; the model is as it was afterwards."""
        run, config = self.run, self.run.config
        device = run.accelerator.device
        pipe = load_parts(run.source, device, without=("transformer", "transformer_2", *_TEXT_PARTS))
        pipe.transformer = run.transformer
        run.transformer.eval()
        attention = config.attention
        options: dict[str, object] = {}
        if attention.method != "dense":
            schedule = {"first_steps": attention.first_steps, "first_layers": attention.first_layers}
            options = {**attention.options, **schedule}
        sparsify(pipe, make_processor(attention.method, options))
        try:
            with torch.no_grad(), run.accelerator.autocast(), shifted(pipe, run.schedule.shift):
                return [pipe(**self._call(text, device)).frames[0].float().cpu() for text in self.texts]
        finally:
            run.bind()

    def _call(self, text: Text, device: torch.device) -> dict[str, Any]:
        validate = self.run.config.validate
        call: dict[str, Any] = {_ARGUMENTS[name]: value.to(device) for name, value in text.items()}
        if self.negative is not None:
            call |= {f"negative_{_ARGUMENTS[name]}": value.to(device) for name, value in self.negative.items()}
        seed = self.run.config.train.seed
        return call | {
            "num_frames": self.frames, "height": self.height, "width": self.width,
            "num_inference_steps": validate.steps, "guidance_scale": validate.guidance,
            "max_sequence_length": self.run.source.defaults.max_sequence_length,
            "generator": torch.Generator("cpu").manual_seed(seed), "output_type": "pt",
        }  # fmt: skip

    def _write(self, name: str, video: Tensor) -> Path:
        path = self.run.folder / FOLDER / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        try:
            with naming(path):
                write_mp4(part, video, self.run.fps)
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path
