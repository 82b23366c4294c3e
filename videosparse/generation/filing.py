"""The files of one run: their endings, and which of those under a name an earlier run left behind."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from videosparse.metrics import video as videos

ENDINGS = (".mp4", ".json")
LATENTS = ".safetensors"
COMPARED = tuple(f"{what}.mp4" for what in videos.COMPARED)

RECORD_FORMAT = "videosparse-generation-1"
LATENTS_METADATA = "videosparse_latents"


def endings(*, compare: bool = False, latents: bool = False) -> tuple[str, ...]:
    """Endings of the files of one run."""
    found = (".mp4", *COMPARED, ".json") if compare else ENDINGS
    return (*found, LATENTS) if latents else found


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a run; None where the file is gone or somebody else's."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("format") == RECORD_FORMAT else None


def record_of_latents(path: Path) -> dict[str, Any] | None:
    """The record that latents carry; None where the file is gone or holds no latents of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            data = json.loads((file.metadata() or {}).get(LATENTS_METADATA, "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def leftovers(folder: Path, stem: str, written: Collection[str], run: str | None = None) -> list[Path]:
    """Files under a name that an earlier run of ours made and a new one does not replace; look before it does.

    Other files stay, such as a LoRA of that name, or a video that has a record of its own.

    Args:
        folder, stem: the name.
        written: endings of the new run.
        run: fingerprint of an earlier run whose files stay, since the new one goes on from it.
    """

    def place(ending: str) -> Path:
        return folder / f"{stem}{ending}"

    record, latents = read_record(place(".json")), record_of_latents(place(LATENTS))
    found = []
    if record is not None and (run is None or record.get("fingerprint") != run):
        found.append(".json")
        if "comparison" in record:
            found += [ending for ending in COMPARED if read_record(place(ending).with_suffix(".json")) is None]
    if latents is not None and (run is None or latents.get("fingerprint") != run):
        found.append(LATENTS)
    return [place(ending) for ending in found if ending not in written and place(ending).is_file()]
