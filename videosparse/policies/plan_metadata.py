"""The metadata of files that calibration writes, as JSON: sealed when written, and checked for types when read."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from videosparse.blocks import BLOCK_SIZES

_SEAL = "metadata_checksum"


def sealed(about: Mapping[str, Any]) -> str:
    """A table as JSON in one line, keys sorted, with a checksum of the rest; NaN and infinity are refused."""
    return json.dumps({**about, _SEAL: _seal(about)}, sort_keys=True, allow_nan=False)


def parsed(text: str) -> dict[str, Any]:
    """The table that a JSON text is.

    Raises:
        ValueError: it is no JSON, or no table.
    """
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its metadata is no JSON") from error
    if not isinstance(about, dict):
        raise ValueError("its metadata is no table")
    return about


def check_seal(about: Mapping[str, Any]) -> None:
    """Raise ValueError where a table is not what was `sealed`; files of before have no such checksum."""
    if _SEAL in about and about[_SEAL] != _seal({key: value for key, value in about.items() if key != _SEAL}):
        raise ValueError("its metadata does not match its checksum")


def _seal(about: Mapping[str, Any]) -> int:
    """CRC-32."""
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of all tensors by name: says whether a file is what was written, not who wrote it."""
    value = 0
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        flat = x.as_strided((x.numel(),), (1,))  # axes of length 1 may have any stride, which bytes may not
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number, and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_list(value: Any, is_one: Callable[[Any], bool], number: int | None = None) -> bool:
    """Whether a value is a list of such items, and of so many of them."""
    return isinstance(value, list) and all(map(is_one, value)) and number in (None, len(value))


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_share(value: Any) -> bool:
    return value is None or (is_number(value) and 0 < value <= 1)


def _is_method(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("shift") is None or is_number(value["shift"]))


_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model_class": ("a text", lambda value: isinstance(value, str)),
    "config": ("a table that is not empty", _is_config),
    "grid": ("three whole numbers, each of which must be at least 1", lambda value: is_list(value, is_count, 3)),
    "text": ("a whole number", lambda value: is_count(value, 0)),
    **{name: ("a whole number, at least 1", is_count) for name in ("layers", "heads", "buckets")},
    "block": (
        "(query rows, key rows), each 64 or 128",
        lambda value: is_list(value, lambda size: is_count(size) and size in BLOCK_SIZES, 2),
    ),
    **{name: ("null or a number in 0..1, 0 excluded", _is_share) for name in ("density", "mass")},
    "video": ("three whole numbers", lambda value: is_list(value, lambda size: is_count(size, 0), 3)),
    "method": ("a table whose shift is null or a number", _is_method),
    "prompts": ("a text", lambda value: isinstance(value, str)),
    "versions": ("a table", lambda value: isinstance(value, dict)),
    "others": ("a list of tables that are not empty", lambda value: is_list(value, _is_config)),
    "weights": ("a list of texts", lambda value: is_list(value, lambda one: isinstance(one, str))),
}
"""What each field of `paro_plan.PlanFacts` has to be in a file."""


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that no plan has."""
    for name, value in values.items():
        expected, fits = _EXPECTED[name]
        if not fits(value):
            raise ValueError(f"{name} must be {expected} (got {_shortened(value)})")


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
