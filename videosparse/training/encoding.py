"""Encoding clips once: `prepare`, which fills a data set and can be interrupted and called again at any time."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videosparse.files import whole, write_json, write_tensors, write_text
from videosparse.generation.environment import DTYPES, choose_device, choose_dtype
from videosparse.generation.errors import GenerationError, one_line
from videosparse.generation.latents import prepare_vae
from videosparse.generation.output import check_writable
from videosparse.generation.request import RATES, check_within
from videosparse.generation.sources import ModelSource, check_text_to_video, find_model
from videosparse.training.clips import BrokenClip, ClipSource, Size, check_size, nearest_size, probe
from videosparse.training.config import ConfigError
from videosparse.training.dataset import EMPTY, FORMAT, SKIPPED, finite, packed, read_about, shards, write_shard
from videosparse.training.families import TRAINING_FAMILIES, Text
from videosparse.training.tiny.parallel_vae import ParallelVae

# values of a clip that goes through Wan's VAE at once: 321 frames of 128x128
_WHOLE = 3 * 321 * 128 * 128

OPTIONS = ("--frames", "The height of --size", "The width of --size", "--fps")
"""How `lora/prepare_dataset.py` calls what is checked."""

Report = Callable[[int, int, int], None]
"""Called with clips done, skipped, and in all."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: clips encoded now, clips that were there, and broken ones with the reason."""

    encoded: int
    present: int
    skipped: tuple[tuple[str, str], ...]


def prepare(
    clips: Sequence[ClipSource],
    folder: Path,
    model: str | None,
    sizes: Sequence[Size],
    *,
    fps: float | None = None,
    names: tuple[str, str, str, str] = OPTIONS,
    device: str = "auto",
    per_shard: int = 16,
    report: Report = lambda done, skipped, total: None,
) -> Prepared:
    """Encode clips into a data set; those that are there are left alone.

    Args:
        clips: where from.
        folder: of the data set.
        model: whose VAE and text encoder; a folder, hub id or name.
        sizes: what clips are cut to: each goes to the size of its own shape, at every length.
        fps: frames a second that clips are brought to, see `clips.at_rate`; None for the model's.
        names: of frames, height, width and fps, for messages.
        device: for the encoders.
        per_shard: clips in a file; what is lost at most when interrupted.
        report: told about progress.

    Raises:
        ConfigError: a size that the model cannot take, a rate that is none, or a data set of another model or rate in
            that folder.
        GenerationError: no such model, one that needs more than a prompt, or a folder that cannot be written.
        OSError: the disk is full; what is there stays, and another call adds the rest.
    """
    source = find_model(model)
    check_text_to_video(source)
    for size in sizes:
        check_size(source, size.frames, size.height, size.width, names[:3])
    rate = source.defaults.fps if fps is None else fps
    try:
        check_within(names[3], rate, RATES, "; leave it out for the model's")
    except GenerationError as error:
        raise ConfigError(str(error)) from None
    rate = float(rate)
    describe_folder(folder, source, rate)
    known = {entry["key"] for _, _, entries in shards(folder) for entry in entries}
    todo: dict[Size, list[tuple[str, ClipSource]]] = {}
    asked: set[str] = set()
    skipped: list[tuple[str, str]] = []
    present = 0
    for clip in clips:
        try:
            wanted = _sizes_of(clip, sizes)
            content = clip.content()
        except BrokenClip as error:
            skipped.append((clip.name, str(error)))
            continue
        for size in wanted:
            key = hashlib.sha256(f"{content} {size}".encode()).hexdigest()[:24]
            if key in known:
                present += 1
            elif key not in asked:
                asked.add(key)
                todo.setdefault(size, []).append((key, clip))
    encoded = 0
    total = sum(len(jobs) for jobs in todo.values())
    if total or not (folder / EMPTY).is_file():
        encoder = _Encoder(source, choose_device(device))
        captions = sorted({clip.caption for jobs in todo.values() for _, clip in jobs})
        texts = encoder.texts(["", *captions])
        _write_empty(folder, texts[""])
        for size, jobs in todo.items():
            for at in range(0, len(jobs), per_shard):
                good: list[tuple[str, ClipSource]] = []
                latents: list[Tensor] = []
                for job in jobs[at : at + per_shard]:
                    try:
                        latents.append(encoder.video(job[1].read(size, rate, encoder.device)))
                        good.append(job)
                    except BrokenClip as error:
                        skipped.append((job[1].name, str(error)))
                ready = [(k, c.name, c.caption, x, texts[c.caption]) for (k, c), x in zip(good, latents, strict=True)]
                if ready:
                    write_shard(folder, size, ready, torch.bfloat16)
                encoded += len(ready)
                report(encoded, len(skipped), total)
    _write_skipped(folder, skipped)
    return Prepared(encoded, present, tuple(skipped))


class _Encoder:
    """The text encoder, and then the VAE, of a pipeline: never both on the device, never the transformer."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self.family = TRAINING_FAMILIES[source.spec.family]
        self._vae: Any = None

    def texts(self, captions: Sequence[str]) -> dict[str, Text]:
        """What the transformer reads of each caption, without the batch dimension."""
        pipe = load_parts(self.source, self.device, without=("transformer", "transformer_2", "vae"))
        length = self.source.defaults.max_sequence_length
        found = {}
        for caption in captions:
            text = self.family.encode_text(pipe, [caption], length)
            found[caption] = {name: value[0].cpu() for name, value in text.items()}
            if not finite(found[caption]):
                raise ConfigError(
                    f"The text encoder of {self.source.name} gives NaN or infinity for the caption {caption!r}; look "
                    "at its weights, or change the caption."
                )
        del pipe
        gc.collect()
        return found

    def video(self, video: Tensor) -> Tensor:
        """Latents [C, T, h, w] of a video [3, F, H, W].

        Raises:
            BrokenClip: they are NaN or infinite.
        """
        if self._vae is None:
            names = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            self._vae = load_parts(self.source, self.device, without=names).vae
            prepare_vae(self._vae, self.source)
        if ParallelVae.fits(self._vae) and video.numel() <= _WHOLE:
            # four times as fast as Diffusers' loop over chunks, which saves memory that a small clip does not need
            with torch.no_grad():
                mode = ParallelVae(self._vae).encode(video[None].to(self.device) * 2 - 1)[0]
            latents = self.family.normalise(self._vae, mode)[0]
        else:
            latents = self.family.encode_video(self._vae, video[None])[0]
        if not finite({"latents": latents}):
            raise BrokenClip("is encoded as NaN or infinity")
        return latents


def load_parts(source: ModelSource, device: torch.device, without: Sequence[str], **more: Any) -> Any:
    """A pipeline on a device without some of its parts, which are not read from disk; `more` are parts in memory.

    Raises:
        ConfigError: weights are missing or damaged.
    """
    import diffusers

    cls = getattr(diffusers, source.pipeline_class)
    has = set(cls._get_signature_keys(cls)[0]) | set(cls._optional_components)
    dtypes: dict[str, torch.dtype] = {"default": DTYPES[choose_dtype("auto", device)]}
    if source.pipelines.vae_float32:
        dtypes["vae"] = torch.float32
    absent = {name: None for name in without if name in has}
    try:
        pipe = cls.from_pretrained(source.location, dtype=dtypes, **absent, **more)
    except Exception as error:  # four libraries read these files, and each raises its own
        raise ConfigError(f"Cannot load {source.location} ({type(error).__name__}: {one_line(error)}).") from error
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in more:
            part.to(device).requires_grad_(False)
    return pipe


def _sizes_of(clip: ClipSource, sizes: Sequence[Size]) -> list[Size]:
    """The sizes that a clip is cut to: one shape, every length."""
    if clip.video is None or len({(s.height, s.width) for s in sizes}) == 1:
        return list(sizes)
    best = nearest_size(probe(clip.video), list(sizes))
    return [size for size in sizes if (size.height, size.width) == (best.height, best.width)]


def describe_folder(folder: Path, source: ModelSource, fps: float) -> None:
    """Write `dataset.json`, or check that the data set was made by the same encoders at the same rate."""
    config = json.loads((Path(source.location or "") / "vae/config.json").read_text()) if _is_local(source) else {}
    about = {
        "format": FORMAT,
        "model": source.name,
        "family": source.spec.family,
        "time_stride": source.spec.stride[0],
        "fps": fps,
        "text_length": source.defaults.max_sequence_length,
        "vae": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
    }
    if (folder / "dataset.json").is_file():
        there = read_about(folder)
        different = [name for name, value in about.items() if there.get(name) != value]
        if different:
            raise ConfigError(
                f"{folder} was encoded with another {different[0]} ({there.get(different[0])!r}, now "
                f"{about[different[0]]!r}); use another folder."
            )
        return
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "dataset.json", about)


def _is_local(source: ModelSource) -> bool:
    return source.location is not None and (Path(source.location) / "vae/config.json").is_file()


def _write_empty(folder: Path, text: Text) -> None:
    with whole(folder / EMPTY) as part:
        write_tensors(packed(text, torch.bfloat16), part)


def _write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> None:
    path = folder / SKIPPED
    if not skipped:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"video": name, "reason": reason}, ensure_ascii=False) for name, reason in skipped]
    write_text(path, "\n".join(lines) + "\n")
