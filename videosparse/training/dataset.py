"""A data set of encoded clips on disk: latents and what the transformer reads of the captions.

A folder of safetensors shards, each of one size of clip, each written whole. The names and hashes of the clips of a
shard are in its own header, so that a data set is as complete as the shards that are there, and preparing it again
adds what is missing. `dataset.json` says what made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videosparse.files import whole, write_tensors
from videosparse.generation.errors import one_line
from videosparse.training.clips import Size
from videosparse.training.config import ConfigError
from videosparse.training.families import Text

FORMAT = "videosparse-dataset-2"
EMPTY = "empty.safetensors"
SKIPPED = "skipped.jsonl"
FINITE = "finite"
"""What the header of a shard calls whether all its values are numbers."""
_ABOUT = {"model": str, "family": str, "time_stride": int, "fps": int | float}


@dataclass(frozen=True)
class Entry:
    """Where one encoded clip lies: `key` is the hash of what it was made from."""

    key: str
    name: str
    caption: str
    shard: Path


@dataclass(frozen=True)
class Bucket:
    """The clips of one size."""

    size: Size
    entries: tuple[Entry, ...]


def write_shard(
    folder: Path, size: Size, clips: Iterable[tuple[str, str, str, Tensor, Text]], dtype: torch.dtype
) -> Path:
    """Write clips (key, name, caption, latents [C, T, h, w], text) as one shard, named by its content.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    tensors: dict[str, Tensor] = {}
    header: list[dict[str, str]] = []
    for key, name, caption, latents, text in clips:
        tensors[f"{key}.latents"] = latents.to("cpu", dtype).contiguous()
        tensors |= {f"{key}.{part}": value for part, value in packed(text, dtype).items()}
        header.append({"key": key, "name": name, "caption": caption})
    digest = hashlib.sha256("".join(sorted(entry["key"] for entry in header)).encode()).hexdigest()[:16]
    path = folder / f"{size}-{digest}.safetensors"
    with whole(path) as part:
        about = {"clips": json.dumps(header), "size": str(size), "format": FORMAT, FINITE: json.dumps(finite(tensors))}
        write_tensors(tensors, part, metadata=about)
    return path


def packed(text: Mapping[str, Tensor], dtype: torch.dtype) -> Text:
    """Text of one caption, on the CPU, without the zeros at its end, which `unpacked` brings back."""
    stored: Text = {}
    for name, value in text.items():
        value = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        if value.dim() == 2:
            used = int(value.ne(0).any(1).nonzero().max()) + 1 if bool(value.ne(0).any()) else 0
            stored[f"{name}.length"] = torch.tensor(len(value))
            value = value[: max(1, used)].clone()
        stored[name] = value
    return stored


def finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(value.isfinite().all()) for value in tensors.values())


def unpacked(stored: Mapping[str, Tensor]) -> Text:
    """What `packed` was given."""
    text: Text = {}
    for name, value in stored.items():
        if name.endswith(".length"):
            continue
        length = stored.get(f"{name}.length")
        if length is not None:
            value = torch.cat([value, value.new_zeros(int(length) - len(value), value.shape[1])])
        text[name] = value
    return text


class Dataset:
    """An encoded data set.

    Args:
        folder: that `lora/prepare_dataset.py` wrote.
        holdout: clips of every size that are kept for validation; the same ones whenever the data set is the same.

    Raises:
        ConfigError: nothing there, a damaged shard, a clip that is NaN or infinite somewhere, or too few clips.
    """

    def __init__(self, folder: str | Path, holdout: int = 0) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        self._open: dict[Path, Any] = {}
        found: dict[Size, list[Entry]] = {}
        for path, size, clips in shards(self.folder):
            _check_finite(path, clips)
            found.setdefault(size, []).extend(Entry(c["key"], c["name"], c["caption"], path) for c in clips)
        self.train: list[Bucket] = []
        self.held: list[Bucket] = []
        for size in sorted(found, key=str):
            entries = sorted({e.key: e for e in found[size]}.values(), key=lambda e: e.key)
            if len(entries) <= holdout:
                raise ConfigError(
                    f"{self.folder} has {len(entries)} clips of {size}, and data.holdout keeps {holdout} of every "
                    "size; prepare more clips, or lower it."
                )
            self.held.append(Bucket(size, tuple(entries[:holdout])))
            self.train.append(Bucket(size, tuple(entries[holdout:])))
        if not self.train:
            raise ConfigError(f"{self.folder} has no clips; run lora/prepare_dataset.py again.")
        self.empty = unpacked(_tensors(self.folder / EMPTY))

    def __deepcopy__(self, memo: dict[int, object]) -> Dataset:
        raise TypeError("A data set holds open files; open it again.")

    def fingerprint(self, *parts: list[Bucket]) -> str:
        """Hash of which clips are in each part, such as `train` and `held`, whatever their order and their shards."""
        kept = [sorted(e.key for b in buckets for e in b.entries) for buckets in parts]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]

    def of_length(self, buckets: list[Bucket], frames: int) -> list[Bucket]:
        """The buckets of clips of `frames` pixel frames, else of the next longer ones, whose beginning serves.

        Raises:
            ConfigError: all clips are shorter.
        """
        lengths = sorted({bucket.size.frames for bucket in buckets if bucket.size.frames >= frames})
        if not lengths:
            has = sorted({bucket.size.frames for bucket in buckets})
            raise ConfigError(
                f"train.frames asks for {frames} frames, and {self.folder} has clips of {has}; prepare longer ones."
            )
        return [bucket for bucket in buckets if bucket.size.frames == lengths[0]]

    def read(self, entry: Entry, frames: int) -> tuple[Tensor, Text]:
        """Latents fp32 [C, T, h, w] of the first `frames` pixel frames, and the text, of one clip."""
        tensors = _clip(self._file(entry.shard), entry.key)
        latents = tensors.pop("latents").float()
        return latents[:, : (frames - 1) // int(self.about["time_stride"]) + 1], unpacked(tensors)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


def read_about(folder: Path) -> dict[str, Any]:
    """What made a data set.

    Raises:
        ConfigError: there is none, or it is damaged or of another format.
    """
    path = folder / "dataset.json"
    try:
        about: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"No data set at {folder}; write one with lora/prepare_dataset.py.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise ConfigError(f"{path} is of format {found!r}, expected {FORMAT!r}; prepare it again.")
    for name, kind in _ABOUT.items():
        if not isinstance(about.get(name), kind):
            wanted = "a number" if kind is not str else "text"
            raise ConfigError(
                f"{path} is damaged: {name} must be {wanted} (got {about.get(name)!r}); delete it and prepare the data "
                "set again."
            )
    return dict(about)


def shards(folder: Path) -> Iterator[tuple[Path, Size, list[dict[str, str]]]]:
    """(path, size, clips) of every shard.

    Raises:
        ConfigError: a shard is damaged, or another file is among them.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == EMPTY:
            continue
        header = _header(path)
        if not {"size", "clips"} <= set(header):
            raise ConfigError(
                f"{path} is no part of a data set; move it elsewhere, and give the data set a folder of its own."
            )
        try:
            frames, height, width = (int(number) for number in header["size"].split("x"))
            clips = [
                {name: str(clip[name]) for name in ("key", "name", "caption")} for clip in json.loads(header["clips"])
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from error
        yield path, Size(frames, height, width), clips


def _clip(shard: Any, key: str) -> Text:
    """The tensors of a clip in an open shard."""
    names = [name for name in shard.keys() if name.startswith(f"{key}.")]  # noqa: SIM118  no mapping
    return {name.removeprefix(f"{key}."): shard.get_tensor(name) for name in names}


def _check_finite(path: Path, clips: Iterable[Mapping[str, str]]) -> None:
    """Raise ConfigError for a value that would end the training as if its rate were too high.

    Shards that say of themselves that there is none are not read, so that a large data set is opened at once.
    """
    if _header(path).get(FINITE) == "true":
        return
    with safe_open(path, framework="pt") as file:
        for clip in clips:
            if not finite(_clip(file, clip["key"])):
                raise ConfigError(
                    f"The clip {clip['name']} in {path} has values that are NaN or infinite; delete that file and "
                    "prepare the data set again, which leaves out a clip that is encoded so once more."
                )


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is damaged ({one_line(error)}); delete it and prepare the data set again.")


def _tensors(path: Path) -> Text:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is missing or damaged ({error}); prepare the data set again.") from error
