"""What files are now, by which a record tells whether what made a video has changed since."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_MODEL_FILES = ".json", ".safetensors", ".bin"


def digest(values: object) -> str:
    """A hash of plain values, 16 letters."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_state(path: str | Path) -> list[object]:
    """Where a file is, its size and when it changed; only where, once it is gone."""
    place = Path(path).expanduser().absolute()
    try:
        status = place.stat()
    except OSError:
        return [str(place)]
    return [str(place), status.st_size, status.st_mtime_ns]


def model_state(location: str | None) -> str | None:
    """A hash of what the weights and configurations in a model's folder are now; None for one of the hub.

    Only its index and the folders of the components that this names count: videos may go into the folder, too.
    """
    if location is None or not (folder := Path(location).expanduser()).is_dir():
        return None
    index = folder / "model_index.json"
    parts = [folder / name for name in _components(index)]
    files = [path for part in parts for kind in _MODEL_FILES for path in part.glob(f"*{kind}")]
    return digest([[str(path.relative_to(folder)), *file_state(path)[1:]] for path in sorted([index, *files])])


def _components(index: Path) -> list[str]:
    """Names of the components that a pipeline loads; none where its index cannot be read, which loading tells."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(values, dict):
        return []
    return [name for name, kind in values.items() if isinstance(kind, list) and kind and kind[-1] is not None]
