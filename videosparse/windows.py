"""Long videos by windows of latent frames: at every denoising step the transformer is called on overlapping windows,
each no longer than it was trained for, and what it predicts is blended with smooth weights.

What attention, rotary embeddings and activations see is one window, so memory and the work of a frame do not grow with
the length. A window knows what lies beyond it only by what it shares with its neighbours.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from videosparse.models import family_of

_WINDOWS = "_videosparse_windows"
_CURRENT = "_videosparse_window"


@dataclass(frozen=True)
class Windows:
    """How a sequence of latent frames is cut.

    Args:
        size: latent frames of a window.
        shared: of these, how many neighbours have in common; the last window is moved back to end with the video, and
            may share more.

    Raises:
        ValueError: a window that is empty, or neighbours that share nothing or all.
    """

    size: int
    shared: int

    def __post_init__(self) -> None:
        if not 1 <= self.shared < self.size:
            raise ValueError(
                f"Neighbouring windows must share 1 to {self.size - 1} of their {self.size} latent frames "
                f"(got {self.shared})."
            )

    def starts(self, frames: int) -> list[int]:
        """First latent frame of each window of a video of so many; one window where it covers all."""
        if frames <= self.size:
            return [0]
        return [*range(0, frames - self.size, self.size - self.shared), frames - self.size]

    def weights(self, frames: int) -> torch.Tensor:
        """fp32 [windows, min(size, frames)]: what each frame of each window counts; over windows they add up to 1.

        Weights rise and fall by half a cosine over what neighbours share, so that no frame is a seam.
        """
        starts, size = self.starts(frames), min(self.size, frames)
        weights = torch.ones(len(starts), size, dtype=torch.float64, device="cpu")
        for number, (left, right) in enumerate(pairwise(starts)):
            shared = left + size - right
            place = (torch.arange(shared, dtype=torch.float64, device="cpu") + 0.5) / shared
            rise = (1 - torch.cos(math.pi * place)) / 2
            weights[number + 1, :shared] *= rise
            weights[number, size - shared :] *= rise.flip(0)
        total = torch.zeros(frames, dtype=torch.float64, device="cpu")
        for start, own in zip(starts, weights, strict=True):
            total[start : start + size] += own
        for start, own in zip(starts, weights, strict=True):
            own /= total[start : start + size]
        return weights.float()


class _Windowed:
    """Put in front of a transformer's class: a call becomes one call for each window.

    So every hook of the transformer, ours and those of offloading, fires for each window and sees its inputs only.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, call = vars(self), super().__call__  # type: ignore[misc]  # that of the transformer behind
        windows: Windows = state[_WINDOWS]
        cls: Any = type(self)
        inputs = {**dict(zip(_names(cls), args, strict=False)), **kwargs}
        frames = int(inputs["hidden_states"].shape[2])
        if frames <= windows.size:
            return call(**inputs)
        _check_no_cache(self)
        blended: torch.Tensor | None = None
        out: Any = None
        try:
            for number, (start, weights) in enumerate(
                zip(windows.starts(frames), windows.weights(frames), strict=True)
            ):
                state[_CURRENT] = number
                out = call(**_part(inputs, frames, slice(start, start + windows.size)))
                found = out[0]
                if blended is None:
                    blended = found.new_zeros(*found.shape[:2], frames, *found.shape[3:], dtype=torch.float32)
                own = weights.to(found.device)[:, None, None]
                blended[:, :, start : start + windows.size] += found.float() * own
        finally:
            state.pop(_CURRENT, None)
        assert blended is not None
        blended = blended.to(out[0].dtype)
        return (blended, *out[1:]) if isinstance(out, tuple) else type(out)(sample=blended)


def current_window(transformer: torch.nn.Module) -> int | None:
    """Number of the window that a transformer is being called on; None where it sees the whole video."""
    found: int | None = vars(transformer).get(_CURRENT)
    return found


def enter(transformer: torch.nn.Module, windows: Windows) -> None:
    """Call a transformer by windows from now on.

    Raises:
        NotImplementedError: a model that takes frames beside the latents, or blocks of several latent frames.
        RuntimeError: it is called by windows already.
    """
    if _WINDOWS in vars(transformer):
        raise RuntimeError("context_windows is in force on this pipeline already; leave that block first.")
    _check_model(transformer)
    cls: Any = type(transformer)
    setattr(transformer, _WINDOWS, windows)
    transformer.__class__ = _windowed(cls)


def leave(transformer: torch.nn.Module) -> None:
    """Undo `enter`."""
    vars(transformer).pop(_WINDOWS)
    transformer.__class__ = type(transformer).__mro__[2]


@cache
def _windowed(cls: Any) -> Any:
    """A class that says it is `cls`: names decide how Diffusers and peft treat a model."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Windowed, cls), names)


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(cls.forward).parameters if name != "self")


def _part(inputs: Mapping[str, Any], frames: int, window: slice) -> dict[str, Any]:
    """The inputs of a transformer for one window: latents, and timesteps where every token has one."""
    part = dict(inputs, hidden_states=inputs["hidden_states"][:, :, window])
    timestep = inputs.get("timestep")
    if isinstance(timestep, torch.Tensor) and timestep.dim() == 2:
        part["timestep"] = timestep.view(timestep.shape[0], frames, -1)[:, window].flatten(1)
    return part


def _check_model(transformer: Any) -> None:
    """Raise NotImplementedError unless a window of latents is all that the model needs of a window."""
    config, family = transformer.config, family_of(transformer)
    conditions = (
        type(transformer).__name__ == "WanVACETransformer3DModel",
        config.get("image_dim"),
        config.get("image_condition_type"),
        config.get("in_channels") != (config.get("out_channels") or config.get("in_channels")),
    )
    if any(conditions):
        raise NotImplementedError(
            f"This {type(transformer).__name__} is given frames beside the latents, which only the first window would "
            "see; context windows are for text-to-video and video-to-video."
        )
    if family.patch(config)[0] != 1:
        raise NotImplementedError("Context windows need a model whose tokens hold one latent frame each.")


def _check_no_cache(transformer: Any) -> None:
    """Raise RuntimeError where a step cache would take one window for the step before of another."""
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError(
            "A step cache compares a call with the one before, which with context windows is another window; call "
            "transformer.disable_cache(), or drop the windows."
        )
