"""Which weights a row is about: models of one name may differ in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_ENDINGS = (".safetensors", ".bin")
_PARTS, _BYTES = 16, 65536


def weights_id(location: str | Path) -> str:
    """A short hash of a model's weights; of its name where it is not a folder, such as a model of the hub.

    Of every weight file it reads the size and sixteen parts all over it, which takes no time: weights that were trained
    further differ everywhere. Copies of a model have one hash, wherever they are.
    """
    folder = Path(location)
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(str(location).encode())
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _ENDINGS):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with path.open("rb") as file:
            for part in range(_PARTS):
                file.seek(max(0, size - _BYTES) * part // (_PARTS - 1))
                digest.update(file.read(_BYTES))
    return f"sha256:{digest.hexdigest()[:12]}"
