"""Which clips, noise and captions a step sees: all of it follows from the seed and the number of the sample.

Nothing is kept between steps, so a run that is resumed, or spread over other numbers of processes with as many samples
a step, sees the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videosparse.training.config import Config
from videosparse.training.dataset import Bucket, Dataset, Entry
from videosparse.training.families import Text
from videosparse.training.noise import NoiseLevels, RunSchedule


@dataclass(frozen=True)
class Step:
    """What all processes have in common in one optimizer step, so that none waits for another.

    Args:
        number: from 0.
        frames: pixel frames.
        bucket: where clips are taken from.
        turn: steps of this length that took clips from it before.
        dense: whether attention is dense, as it is in a run at the noise levels of this step.
    """

    number: int
    frames: int
    bucket: Bucket
    turn: int
    dense: bool


@dataclass(frozen=True)
class Batch:
    """Latents fp32 [B, C, T, h, w], noise of that shape, noise levels [B], and the text [B, ...]."""

    latents: Tensor
    noise: Tensor
    levels: Tensor
    text: Text

    @property
    def noisy(self) -> Tensor:
        """(1 - s) x0 + s eps."""
        s = self.levels.view(-1, 1, 1, 1, 1)
        return (1 - s) * self.latents + s * self.noise

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        text = {name: value.to(device) for name, value in self.text.items()}
        return Batch(self.latents.to(device), self.noise.to(device), self.levels.to(device), text)


class Sampler:
    """Draws the samples of a run.

    Args:
        config: of the run.
        data: to take clips from.
        levels: the noise levels that are trained.
        schedule: of the videos that are made later, which says what is dense.
        in_step: samples of one optimizer step, over all processes.
    """

    def __init__(self, config: Config, data: Dataset, levels: NoiseLevels, schedule: RunSchedule, in_step: int) -> None:
        self.config, self.data, self.levels, self.in_step = config, data, levels, in_step
        first = config.attention.first_steps if config.attention.method != "dense" else 0.0
        self._turns: dict[int, list[tuple[int, int]]] = {}
        self.threshold = schedule.dense_above(first)
        self.dense_share = levels.share_above(self.threshold) if first > 0 else 0.0

    def step(self, number: int) -> Step:
        """What a step trains."""
        frames = self.config.frames_at(number)
        dense = self._chance(f"{number} dense") < self.dense_share
        bucket, turn = self._turn(frames, sum(self.config.frames_at(n) == frames for n in range(number)))
        return Step(number, frames, bucket, turn, dense)

    def level(self, step: Step, place: int) -> float:
        """The noise level of the sample at `place` in a step: stratified over the step, on the step's side."""
        order = list(range(self.in_step))
        random.Random(f"{self.config.train.seed} {step.number} strata").shuffle(order)
        u = (order[place] + self._chance(f"{step.number} {place} level")) / self.in_step
        share = self.dense_share
        return self.levels.level(1 - share + u * share if step.dense else u * (1 - share))

    def batch(self, step: Step, places: Sequence[int]) -> Batch:
        """The samples at some places (0 to in_step - 1) of a step, on the CPU."""
        parts = []
        for place in places:
            number = step.number * self.in_step + place
            latents, text = self.data.read(self._entry(step, place), step.frames)
            if self._chance(f"{number} caption") < self.config.data.caption_dropout:
                text = self.data.empty
            parts.append((latents, self._noise(f"{number} noise", latents), self.level(step, place), text))
        return stack(parts)

    def held_out(self, entry: Entry, frames: int, level: float) -> Batch:
        """One held-out clip at a noise level, always with the same noise."""
        latents, text = self.data.read(entry, frames)
        return stack([(latents, self._noise(f"held out {entry.key}", latents), level, text)])

    def _turn(self, frames: int, number: int) -> tuple[Bucket, int]:
        """The bucket of the step `number` of a length, and how many steps of that length took it before.

        Each step takes the bucket that is furthest behind its share of the clips, so that clips of all buckets come
        equally often, up to a step.
        """
        turns = self._turns.setdefault(frames, [])
        buckets = self.data.of_length(self.data.train, frames)
        clips = [len(bucket.entries) for bucket in buckets]
        taken = [0] * len(buckets)
        for at, _ in turns:
            taken[at] += 1
        while len(turns) <= number:
            behind = [(len(turns) + 1) * n / sum(clips) - k for n, k in zip(clips, taken, strict=True)]
            at = behind.index(max(behind))
            turns.append((at, taken[at]))
            taken[at] += 1
        at, turn = turns[number]
        return buckets[at], turn

    def _entry(self, step: Step, place: int) -> Entry:
        """The clip of a sample: every clip of a bucket once before any comes again."""
        entries = step.bucket.entries
        epoch, at = divmod(step.turn * self.in_step + place, len(entries))
        order = list(range(len(entries)))
        random.Random(f"{self.config.train.seed} {step.frames} {step.bucket.size} {epoch} order").shuffle(order)
        return entries[order[at]]

    def _chance(self, what: str) -> float:
        return random.Random(f"{self.config.train.seed} {what}").random()

    def _noise(self, what: str, like: Tensor) -> Tensor:
        """Normal noise, drawn on the CPU, so that it is the same on every device."""
        seed = random.Random(f"{self.config.train.seed} {what}").getrandbits(63)
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def stack(parts: Sequence[tuple[Tensor, Tensor, float, Text]]) -> Batch:
    """One batch from samples (latents, noise, level, text)."""
    latents, noise, levels, texts = zip(*parts, strict=True)
    text = {name: torch.stack([t[name] for t in texts]) for name in texts[0]}
    return Batch(torch.stack(latents), torch.stack(noise), torch.tensor(levels, dtype=torch.float32), text)
