"""Which weights the learned dimensions need, where they are looked for, and what to do when one is missing.

Looked for in this order:

    1. the folder of `--weights`: `DIR/dino-vitb16/` or `DIR/facebook/dino-vitb16/` for a model of the hub,
       `DIR/raft_large_C_T_V1-22a6c225.pth` for a single file
    2. the caches: Hugging Face's for models, torch.hub's (`~/.cache/torch/hub/checkpoints`) for files
    3. the network, unless that is forbidden (`--no-download`)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from videosparse.metrics.vbench.ledger import stamp_of
from videosparse.wording import install_extra, one_line

Loaded = TypeVar("Loaded")


class MissingError(RuntimeError):
    """A model cannot be had: the message says which file or package is needed and where to put it, in one line."""


@dataclass(frozen=True)
class Needed:
    """Something that a dimension needs.

    Args:
        source: name of a repository on the hub, or the address of a file.
        packages: what must be installed to run it, by the name to import.
        parts: of a repository, the files that are read.
    """

    source: str
    packages: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def is_file(self) -> bool:
        """Whether it is one file, not a repository of the hub."""
        return self.source.startswith("https://")

    @property
    def name(self) -> str:
        """What the file or folder is called."""
        return self.source.rsplit("/", 1)[-1]


_MODEL = ("config.json", "model.safetensors or pytorch_model.bin")
_TORCH = "https://download.pytorch.org/models"

NEEDED = {
    "dino": Needed("facebook/dino-vitb16", parts=_MODEL),
    "clip-b32": Needed("openai/clip-vit-base-patch32", parts=(*_MODEL, "tokenizer.json")),
    "clip-l14": Needed("openai/clip-vit-large-patch14", parts=_MODEL),
    "laion-head": Needed(
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    ),
    "raft": Needed(f"{_TORCH}/raft_large_C_T_V1-22a6c225.pth", packages=("torchvision",)),
    "musiq": Needed(
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        packages=("pyiqa", "torchvision"),
    ),
    "vgg16": Needed(f"{_TORCH}/vgg16-397923af.pth", packages=("lpips", "torchvision")),
    "alexnet": Needed(f"{_TORCH}/alexnet-owt-7be5be79.pth", packages=("lpips", "torchvision")),
}
"""By the short names that dimensions use."""


@dataclass(frozen=True)
class Weights:
    """Where to look.

    Args:
        folder: of the user's own copies; None where there is none.
        download: whether the network may be asked last.
    """

    folder: Path | None = None
    download: bool = True
    _silent: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    def packages(self, key: str) -> None:
        """Check that what runs a model is installed.

        Raises:
            MissingError: it is not.
        """
        absent = [name for name in NEEDED[key].packages if importlib.util.find_spec(name) is None]
        if absent:
            raise MissingError(f"{key} needs {' and '.join(absent)}: {install_extra('vbench')}.")

    def file(self, key: str) -> Path:
        """The path of a single file, downloaded into torch.hub's folder if need be.

        Raises:
            MissingError: it is nowhere, or what runs it is not installed.
        """
        needed = NEEDED[key]
        self.packages(key)
        cached = Path(torch.hub.get_dir()) / "checkpoints" / needed.name
        for path in (self.folder / needed.name if self.folder else None, cached):
            if path is not None and path.is_file():
                return path
        if self.download:
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(needed.source, str(cached), progress=False)
                return cached
            except OSError as error:  # urllib's errors are OSErrors, too
                raise self._missing(needed, f"and it cannot be downloaded ({_told(error)})") from error
        raise self._missing(needed, "and downloads are off")

    def pretrained(self, key: str, load: Callable[..., Loaded]) -> Loaded:
        """What `load` (a `from_pretrained`) makes of a repository, from the folder, the cache or the hub.

        Raises:
            MissingError: it is nowhere, or the folder's copy cannot be read.
        """
        needed = NEEDED[key]
        self.packages(key)
        for own in self._own_folders(needed):
            if own.is_dir():
                try:
                    return load(str(own), local_files_only=True)
                except Exception as error:  # transformers raises many kinds for a damaged or partial folder
                    told = f"{own} cannot be loaded ({_told(error)}); it must hold {', '.join(needed.parts)}."
                    raise MissingError(told) from error
        try:
            return load(needed.source, local_files_only=True)
        except Exception as error:  # of many kinds, all of which mean that the cache has not got it
            if not self.download:
                raise self._missing(needed, "and downloads are off") from error
        if self._silent:
            raise self._missing(needed, f"and the hub did not answer before ({self._silent[0]})")
        try:
            return load(needed.source, local_files_only=False)
        except Exception as error:  # no network, no such repository, a mirror that fails: all mean missing here
            if _unanswered(error):
                self._silent.append(_told(error))
            raise self._missing(needed, f"and the hub did not give it ({_told(error)})") from error

    def stamp(self, key: str) -> str:
        """Changes when the folder's own copy of a model does; "" for a model as published, from cache or network."""
        places = self._own_folders(NEEDED[key])
        return stamp_of(*sorted(path for place in places for path in (place, *place.rglob("*")) if path.is_file()))

    def _own_folders(self, needed: Needed) -> list[Path]:
        return [self.folder / needed.name, self.folder / needed.source] if self.folder else []

    def _missing(self, needed: Needed, how: str) -> MissingError:
        place = self.folder or Path("DIR")
        looked = f"neither in {self.folder}" if self.folder else "not"
        joint = " nor" if self.folder else ""
        if needed.is_file:
            todo = f"fetch {needed.source} and put it at {place / needed.name}"
            what = needed.name
        else:
            todo = f"run `hf download {needed.source} --local-dir {place / needed.name}`"
            what = f"{needed.source} ({', '.join(needed.parts)})"
        flag = "" if self.folder else ", then pass --weights DIR"
        return MissingError(f"{what} is {looked}{joint} in the cache, {how}; {todo}{flag}.")


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a .pth file.

    Raises:
        MissingError: it cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise MissingError(f"{path} cannot be read ({_told(error)}); fetch it again.") from error
    return state


def fit_state(module: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load tensors into a module; names may begin with the "module." of parallel training.

    Raises:
        MissingError: they are another model's.
    """
    try:
        module.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    except (RuntimeError, AttributeError) as error:
        raise MissingError(f"{path} holds the weights of another model ({_told(error)}); fetch it again.") from error


def _unanswered(error: BaseException | None) -> bool:
    """Whether no connection was behind it: the hub is asked for three quarters of a minute before that is told."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def _told(error: BaseException) -> str:
    return one_line(error, 120)
