"""Files of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the usual permissions: `safetensors.torch.save_file` lets nobody else read it."""
    path.write_bytes(save(dict(tensors), None if metadata is None else dict(metadata)))
