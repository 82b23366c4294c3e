"""Small files, written whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name at the end of the block; its folder is made.

    Nothing is left behind where the block fails, as on a full disk.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with naming(path):
            yield part
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of a block that writes a file name it: a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; its folder is made. NaN and infinity are refused.

    Raises:
        OSError: it cannot be written.
        ValueError: NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_state(state: Any, path: Path) -> None:
    """Write what `torch.save` writes, whole or not at all; its folder is made.

    Raises:
        OSError: it cannot be written.
    """
    with whole(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, "torch could not write it, as on a full disk", str(path)) from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the usual permissions: `safetensors.torch.save_file` lets nobody else read it."""
    path.write_bytes(save(dict(tensors), None if metadata is None else dict(metadata)))
