"""The work of a comparison: `Comparison` makes what is missing, setting by setting, and rows of it."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from videosparse.benchmark.rows import WHERE
from videosparse.evaluation.judging import (
    DIMENSIONS,
    FIDELITY,
    WORLD,
    Seen,
    judged,
)
from videosparse.evaluation.prompts import Prompt
from videosparse.evaluation.running import Batches, Made
from videosparse.evaluation.settings import Conditions, Setting
from videosparse.evaluation.table import RowStore
from videosparse.files import whole, write_tensors
from videosparse.generation.errors import GenerationError, one_line
from videosparse.generation.output import WHOLE, slug
from videosparse.generation.request import Settings
from videosparse.generation.video import write_mp4
from videosparse.metrics.fidelity import CONVENTION

KEY = (
    "model", "setting", "prompt", "seed", "frames", "height", "width", "steps", "guidance", "block", "first_steps",
)  # fmt: skip
"""Columns that tell videos apart."""

FIXED = ("weights", "dtype")
"""Columns of which a table has one value for each model."""

SHARED = ("convention",)
"""Columns of which a table has one value."""

TIMED = ("seconds", "denoise_seconds", "batch", "video", "map", "map_shows", *WHERE)
"""Columns in which two runs of one comparison differ."""

COLUMNS = (
    *KEY, "method", "asked_density", "quant", "tokens", "video_density", "average_density", "seconds",
    "denoise_seconds", "batch", *FIDELITY, *WORLD, *DIMENSIONS, "drift", *SHARED, *FIXED, "video", "map",
    "map_shows", *WHERE,
)  # fmt: skip

logger = logging.getLogger("videosparse")

Submit = Callable[..., Future[Any]]


def kind_of(settings: Settings, weights: str) -> dict[str, str]:
    """What rows say of a model that is not the same in every comparison: the columns of `FIXED` and `SHARED`."""
    return {"weights": weights, "dtype": settings.dtype, "convention": CONVENTION}


@contextmanager
def workers(count: int) -> Iterator[Submit]:
    """A function that runs another in a process of a pool; at once and here if ``count`` is 0."""
    if count == 0:
        yield _here
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn, initializer=_take_one_core) as pool:
        yield pool.submit


def _take_one_core() -> None:
    """Of a worker: its neighbours have the others."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _here(function: Callable[..., Any], *args: Any) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(function(*args))
    return done


@dataclass(eq=False)
class Comparison:
    """One model at one size, a list of settings, and the store of their rows.

    Args:
        batches: makes the videos.
        conditions: what the settings share.
        settings: dense first.
        store: of the rows.
        where: columns of the environment.
        submit: runs what judges videos; see `workers`.
        keep: folder for videos and maps; None keeps none.
        deadline: monotonic time at which no further batch is begun; None is never.
        timed: whether rows say how long videos took; not where other work shares the device.
        failed: settings that could not be run, and why.
    """

    batches: Batches
    conditions: Conditions
    settings: Sequence[Setting]
    store: RowStore
    where: Mapping[str, str]
    submit: Submit
    keep: Path | None = None
    deadline: float | None = None
    timed: bool = True
    failed: dict[str, str] = field(default_factory=dict)
    _warm: set[Setting] = field(default_factory=set)
    _waiting: list[tuple[dict[str, Any], Future[Any]]] = field(default_factory=list)

    def identity(self, setting: Setting, prompt: Prompt) -> dict[str, Any]:
        """The columns of `KEY`, `FIXED` and `SHARED`."""
        made = self.batches.settings
        return {
            "model": made.source.name, "setting": setting.name, "prompt": prompt.prompt,
            "seed": prompt.seed + setting.seed_shift, "frames": made.num_frames, "height": made.height,
            "width": made.width, "steps": made.steps, "guidance": made.guidance,
            "block": "x".join(map(str, self.conditions.block)), "first_steps": self.conditions.first_steps,
            **kind_of(made, self.batches.weights),
        }  # fmt: skip

    def missing(self, setting: Setting, prompts: Sequence[Prompt]) -> list[int]:
        """Which prompts have no row under a setting."""
        return [i for i, prompt in enumerate(prompts) if not self.store.has(self.identity(setting, prompt))]

    def run(self, prompts: Sequence[Prompt], kept: int, advance: Callable[[int], None]) -> bool:
        """Make what is missing of a batch of prompts, under all settings.

        Args:
            prompts: of one batch.
            kept: how many of them, from the first on, leave their videos in `keep`.
            advance: told how many videos are done.

        Returns:
            Whether there was time for all. A setting that fails is noted in `failed` and left out from then on.

        Raises:
            GenerationError: dense videos cannot be made.
        """
        able = [setting for setting in self.settings if setting.name not in self.failed]
        todo = [(setting, self.missing(setting, prompts)) for setting in able]
        advance(sum(len(prompts) - len(wanted) for _, wanted in todo))
        if not any(wanted for _, wanted in todo):
            return True
        dense: list[Seen] = []
        for setting, wanted in [(one, part) for one, places in todo for part in one.made_together(places)]:
            if setting.name in self.failed or (not wanted and not setting.is_reference):
                continue
            if self.deadline is not None and time.monotonic() > self.deadline:
                self._flush()
                return False
            chosen = [prompts[i] for i in wanted]
            if setting.is_reference:
                made = self._dense(prompts)
                dense = [self._seen(prompt, made, place) for place, prompt in enumerate(prompts)]
                assert made.latents is not None
                made = replace(made, videos=made.videos[wanted], latents=made.latents[wanted])
            else:
                other = self._other(setting, chosen, picture=self.keep is not None and 0 in wanted and kept > 0)
                if other is None:
                    continue
                made = other
            self._flush()
            for place, i in enumerate(wanted):
                seen = dense[i] if setting.is_reference else self._seen(prompts[i], made, place)
                twin = None if setting.is_reference or setting.method == "ceiling" else dense[i]
                self._judge(setting, made, seen, twin, keep=i < kept)
            advance(len(wanted))
        self._flush()
        self._cache(prompts).unlink(missing_ok=True)
        return True

    def _other(self, setting: Setting, prompts: Sequence[Prompt], *, picture: bool) -> Made | None:
        """The videos of a setting that is not dense; None where it fails, which the others survive."""
        try:
            if setting.method == "ceiling":
                return self.batches.through_vae(prompts)
            return self._made(setting, prompts, picture=picture)
        except Exception as error:
            logger.debug("setting %s failed", setting.name, exc_info=True)
            told = (
                one_line(error) if isinstance(error, GenerationError) else f"{type(error).__name__}: {one_line(error)}"
            )
            self.failed[setting.name] = told
            return None

    def _made(self, setting: Setting, prompts: Sequence[Prompt], *, picture: bool = False) -> Made:
        processor = self.conditions.processor(setting)
        if setting not in self._warm:
            self.batches.warm_up(prompts, processor)
            self._warm.add(setting)
        return self.batches.make(prompts, processor, seed_shift=setting.seed_shift, picture=picture)

    def _dense(self, prompts: Sequence[Prompt]) -> Made:
        """The dense videos of a batch: all others are compared with these very tensors, in a resumed run, too."""
        from safetensors import safe_open

        path = self._cache(prompts)
        numbers = ("count", "seconds", "denoise_seconds", "video_density", "average_density")
        if path.exists():
            with safe_open(str(path), framework="pt", device=str(self.batches.settings.device)) as file:
                count, seconds, denoise, video, average = (float(file.metadata()[name]) for name in numbers)
                videos, latents = (file.get_tensor(name) for name in ("videos", "latents"))
                return Made(videos, latents, int(count), seconds, denoise, video, average)
        made = self._made(Setting("dense"), prompts)
        assert made.latents is not None
        tensors = {"videos": made.videos.contiguous(), "latents": made.latents.contiguous()}
        with whole(path) as part:
            write_tensors(tensors, part, {name: str(getattr(made, name)) for name in numbers})
        return made

    def _cache(self, prompts: Sequence[Prompt]) -> Path:
        """Where the dense videos of a batch wait for the other settings; another model, machine or code has its own."""
        about: list[Mapping[str, Any]] = [self.identity(Setting("dense"), prompt) for prompt in prompts]
        about.append({name: value for name, value in self.where.items() if name != "run"})
        about.append({"device": self.batches.settings.device.type})
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return self.store.folder / f"dense-{name}.safetensors"

    def _seen(self, prompt: Prompt, made: Made, place: int) -> Seen:
        """One video of a batch, copied to where workers can read it."""
        video = made.videos[place].to("cpu", torch.float32, copy=True)
        latents = None if made.latents is None else made.latents[place].to("cpu", copy=True)
        return Seen(video, latents, prompt, self.batches.settings.fps)

    def _judge(self, setting: Setting, made: Made, seen: Seen, dense: Seen | None, *, keep: bool) -> None:
        """Put one video's row on the list of those that wait for a worker's judgement."""
        run, density = self.batches.settings, self.conditions.density(setting)
        row: dict[str, Any] = self.identity(setting, seen.prompt) | {
            "method": setting.method, "quant": setting.quant, "tokens": run.grid.tokens,
            "asked_density": None if density is None else round(density, 4), "batch": made.count,
        }  # fmt: skip
        for name in ("video_density", "average_density", *(("seconds", "denoise_seconds") if self.timed else ())):
            value = getattr(made, name)
            row[name] = None if value is None else round(value, 4)
        if keep and self.keep is not None:
            row |= self._save(setting, made, seen)
        self._waiting.append((row | dict(self.where), self.submit(judged, seen, dense)))

    def _save(self, setting: Setting, made: Made, seen: Seen) -> dict[str, str]:
        """Keep a video, and the picture of the maps once; returns their names below the folder."""
        assert self.keep is not None
        run, prompt = self.batches.settings, seen.prompt
        folder = Path(f"{slug(run.source.name, WHOLE)}-{run.num_frames}x{run.height}x{run.width}")
        name = slug(setting.name, WHOLE)
        names = {"video": folder / f"{prompt.seed}-{slug(prompt.prompt, 60)}" / f"{name}.mp4"}
        with whole(self.keep / names["video"]) as part:
            write_mp4(part, seen.video, run.fps)
        if made.picture is not None:
            names["map"] = folder / "maps" / f"{name}.png"
            (self.keep / names["map"]).parent.mkdir(parents=True, exist_ok=True)
            (self.keep / names["map"]).write_bytes(made.picture.png)
        shows = {} if made.picture is None else {"map_shows": made.picture.caption}
        return {name: path.as_posix() for name, path in names.items()} | shows

    def _flush(self) -> None:
        """Wait for what the workers say of the last batch, and write its rows."""
        rows = [row | found.result() for row, found in self._waiting]
        if rows:
            self.store.add(rows)
        self._waiting.clear()
