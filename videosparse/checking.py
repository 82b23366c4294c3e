"""What arguments of any call are checked for: their types, in one line each that says what was expected."""

from __future__ import annotations

import math

import torch


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raise TypeError or ValueError unless `value` is an int, no bool, and not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (got {type(value).__name__} {value!r}).")
    if value < least:
        raise ValueError(f"{name} must be at least {least} (got {value}).")


def check_flag(name: str, value: bool) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False (got {shown(value)}).")


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless `value` is an int or a float, no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number (got {shown(value)}).")


def check_share(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number in (0, 1]."""
    check_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in 0..1, 0 excluded (got {value}).")


def check_scale(value: float) -> None:
    """Raise TypeError or ValueError unless `value`, a factor of scores, is a finite number."""
    check_number("scale", value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"scale must be a finite number (got {value}); the default is head_dim ** -0.5.")


def check_device(value: torch.device | str) -> torch.device:
    """The device that `value` is or names; raise TypeError or ValueError where it does neither."""
    if isinstance(value, torch.device):
        return value
    expected = 'device must be a torch.device or the name of one, such as "cpu" or "cuda:0"'
    if not isinstance(value, str):
        raise TypeError(f"{expected} (got {shown(value)}).")
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(f"{expected} (got {value!r}).") from None


def check_tensor(name: str, value: torch.Tensor, what: str) -> None:
    """Raise TypeError unless `value` is a tensor; `what` says of which shape or from where."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor{what} (got {shown(value)}).")


def shown(value: object) -> str:
    """A wrong argument in a message: its type where it would fill lines."""
    parts = value if isinstance(value, tuple) else (value,)
    return repr(value) if all(isinstance(x, str | int | float | None) for x in parts) else type(value).__name__
