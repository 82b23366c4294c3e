"""Step caches of Diffusers in a run: where a step changes little, all blocks but the first are skipped.

FirstBlockCache looks at what the first block changes, MagCache at magnitudes that were measured before (arXiv
2506.09045). Both keep what they need apart by branch of guidance, from `enable_cache` to `disable_cache`: a run gets
fresh ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from videosparse._diffusers import step_cache_states
from videosparse.cases import ModelSpec
from videosparse.components import targets
from videosparse.files import write_json
from videosparse.generation.errors import GenerationError, nearest, one_line

THRESHOLDS = {"first-block": 0.05, "magcache": 0.06}
"""Kinds, and Diffusers' defaults: how much may change (relative, of the first block; accumulated magnitude)."""

FORMAT = "videosparse-magnitudes-1"


@dataclass(frozen=True)
class StepCache:
    """A step cache to run with.

    Args:
        kind: "first-block" or "magcache".
        threshold: higher skips more; 0 skips only where nothing changes.
        magnitudes: for magcache, how much larger what the blocks add is than at the step before, one for each step of
            the run that they were measured in; empty measures them, skipping nothing.
        file: where magnitudes come from, or go to.
    """

    kind: str
    threshold: float
    magnitudes: tuple[float, ...] = ()
    file: Path | None = None

    @property
    def measures(self) -> bool:
        """Whether this run is for finding magnitudes."""
        return self.kind == "magcache" and not self.magnitudes

    def config(self, steps: int) -> Any:
        """The configuration that `enable_cache` takes, for a run of `steps`."""
        from diffusers import FirstBlockCacheConfig, MagCacheConfig

        if self.kind == "first-block":
            return FirstBlockCacheConfig(threshold=self.threshold)
        if self.measures:
            # after the last step that it knows of, it would print and forget
            return MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)
        return MagCacheConfig(
            threshold=self.threshold, num_inference_steps=steps, mag_ratios=torch.tensor(self.magnitudes)
        )


@dataclass(eq=False)
class CacheCount:
    """What a step cache did in a run: forwards of transformers, how many were skipped, magnitudes by branch."""

    forwards: int = 0
    skipped: int = 0
    magnitudes: dict[str, Sequence[float]] = field(default_factory=dict)

    def mean_magnitudes(self) -> tuple[float, ...]:
        """Of all branches: Diffusers takes one list for all."""
        return tuple(fmean(step) for step in zip(*self.magnitudes.values(), strict=True))


def parse_step_cache(text: str) -> StepCache | None:
    """Read "first-block", "magcache=0.1" or "none", which is None.

    Raises:
        GenerationError: an unknown kind, or a threshold that is no number of 0 or more.
    """
    if text == "none":
        return None
    kind, equals, value = (part.strip() for part in text.partition("="))
    if kind not in THRESHOLDS:
        kinds = ("none", *THRESHOLDS)
        raise GenerationError(
            f"Unknown step cache {kind!r}; use {', '.join(kinds[:-1])} or {kinds[-1]}.{nearest(kind, kinds)}"
        )
    if not equals:
        return StepCache(kind, THRESHOLDS[kind])
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold < math.inf:
        raise GenerationError(
            f"The threshold of {kind} must be a number of 0 or more, such as {kind}={THRESHOLDS[kind]} (got {value!r})."
        )
    return StepCache(kind, threshold)


@contextmanager
def step_cached(pipe: object, cache: StepCache | None, steps: int) -> Iterator[CacheCount]:
    """Run a pipeline with a step cache for the time of a block; without one where it is None.

    Raises:
        GenerationError: the pipeline has a cache already.
    """
    count, roots = CacheCount(), targets(pipe)[1] if cache is not None else []
    enabled: list[Any] = []
    handles: list[Any] = []
    try:
        for root in roots:
            assert cache is not None
            if root.is_cache_enabled:
                raise GenerationError(
                    f"The {type(root).__name__} has a cache already; call its disable_cache(), or drop --step-cache."
                )
            root.enable_cache(cache.config(steps))  # type: ignore[operator]
            enabled.append(root)
            handles.append(root.register_forward_hook(_counting(count, step_cache_states(root))))
        yield count
    finally:
        for handle in handles:
            handle.remove()
        for root in enabled:
            root.disable_cache()


def _counting(count: CacheCount, states: Any) -> Any:
    """A forward hook of a transformer that looks at what its step cache decided."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def look(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = states.get_state()
        count.forwards += 1
        count.skipped += not state.should_compute
        if measured := getattr(state, "calibration_ratios", None):
            count.magnitudes[states.context.name] = tuple(measured)

    return look


def check_measured(cache: StepCache | None) -> None:
    """Raise GenerationError where a run would first have to measure, which one video does by itself."""
    if cache is not None and cache.measures:
        raise GenerationError(
            f"{cache.file} is not there yet: make one video first, by the same options without --compare and "
            "--prompts; it measures, and skips nothing."
        )


def read_magnitudes(path: Path, spec: ModelSpec) -> tuple[float, ...]:
    """Magnitudes that were measured before.

    Raises:
        GenerationError: the file is damaged, or of another model.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        magnitudes = tuple(float(value) for value in found["magnitudes"])
        if not magnitudes or not all(0 < value < math.inf for value in magnitudes):
            raise ValueError("no positive numbers")
        model = {name: found[name] for name in _model(spec)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GenerationError(
            f"Cannot read magnitudes from {path} ({one_line(error, 100)}); delete it to measure anew."
        ) from error
    if model != _model(spec):
        raise GenerationError(
            f"{path} was measured with another model ({_text(model)}; here {_text(_model(spec))}); name another file."
        )
    return magnitudes


def write_magnitudes(path: Path, spec: ModelSpec, magnitudes: Sequence[float]) -> None:
    """Keep magnitudes for later runs.

    Raises:
        GenerationError: the file cannot be written.
    """
    try:
        write_json(path, {"format": FORMAT, **_model(spec), "magnitudes": list(magnitudes)})
    except (OSError, ValueError) as error:
        raise GenerationError(f"Cannot write magnitudes to {path}: {one_line(error)}.") from error


def _model(spec: ModelSpec) -> dict[str, object]:
    return {"family": spec.family, "layers": spec.layers, "heads": spec.heads}


def _text(model: dict[str, object]) -> str:
    return f"{model['family']}, {model['layers']} layers, {model['heads']} heads"
