"""The files of one run: their endings, what marks them as ours, and which of them an earlier run left behind."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from videosparse.metrics.video import BESIDE

ENDINGS = (".mp4", ".json")
LATENTS = ".safetensors"
COMPARED = tuple(f"{name}.mp4" for name in BESIDE)

RECORD_FORMAT = "videosparse-generation-1"
LATENTS_FORMAT = "videosparse-latents-1"
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


def latents_metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file of latents, which carries the record of their run."""
    return {LATENTS_METADATA: json.dumps({**about, "latents_format": LATENTS_FORMAT}, default=str)}


def carried_record(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """The record that metadata of a safetensors file carry; None for one of another format.

    Raises:
        KeyError: there is none: these are no latents of ours.
        ValueError: it is no JSON.
    """
    data = json.loads((metadata or {})[LATENTS_METADATA])
    return data if isinstance(data, dict) and data.get("latents_format") == LATENTS_FORMAT else None


def record_of_latents(path: Path) -> dict[str, Any] | None:
    """The record that latents carry; None where the file is gone or holds no latents of ours, or of another format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return carried_record(file.metadata())
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def leftovers(folder: Path, stem: str, written: Collection[str], fingerprint: str | None = None) -> list[Path]:
    """Files under a name that an earlier run of ours made and a new one does not replace; look before it does.

    Other files stay, such as a LoRA of that name, latents that tell no run, or a video that has a record of its own.

    Args:
        folder, stem: the name.
        written: endings of the new run.
        fingerprint: of an earlier run whose files stay, since the new one goes on from it.
    """

    def place(ending: str) -> Path:
        return folder / f"{stem}{ending}"

    record, latents = read_record(place(".json")), record_of_latents(place(LATENTS))
    found = []
    if record is not None and (fingerprint is None or record.get("fingerprint") != fingerprint):
        found.append(".json")
        if "comparison" in record:
            found += [ending for ending in COMPARED if read_record(place(ending).with_suffix(".json")) is None]
    if latents is not None and latents.get("fingerprint") not in (None, fingerprint):
        found.append(LATENTS)
    return [place(ending) for ending in found if ending not in written and place(ending).is_file()]
