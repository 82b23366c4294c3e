"""Files of the hub, fetched once and kept in its cache; what cannot be fetched is one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from videosparse.generation.errors import GenerationError


def fetch(repo: str, file: str) -> Path:
    """One file of a hub model.

    Raises:
        GenerationError: it cannot be fetched; the message begins with its name, in small letters.
    """
    from huggingface_hub import hf_hub_download

    with _told(f"{file} of the hub model {repo} cannot be fetched"):
        return Path(hf_hub_download(repo, file))


def fetch_only(repo: str, usual: str, but: str) -> tuple[Path, str]:
    """The file with the usual name, else the only .safetensors file of a hub model, those named `but` left aside.

    Returns:
        Where it lies now, and its name in the repository.

    Raises:
        GenerationError: see `fetch`; or there are several, or none.
    """
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return fetch(repo, usual), usual
    except GenerationError as error:
        cause = error.__cause__
        if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
            raise  # nothing is known of the repository
    with _told(f"the files of the hub model {repo} cannot be listed"):
        found = [name for name in list_repo_files(repo) if name.endswith(".safetensors") and Path(name).name != but]
    if len(found) != 1:
        several = f"it has {', '.join(found)}; name one: {repo}/{found[0]}" if found else "it has no .safetensors file"
        raise GenerationError(f"the hub model {repo} has no {usual}: {several}.")
    return fetch(repo, found[0]), found[0]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say what could not be done, whatever the hub's client raises, and nothing of its retries."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every retry, and the error below says all
    try:
        yield
    except Exception as error:  # the hub client raises its own, the network library's and OSError
        raise GenerationError(
            f"{what} ({type(error).__name__}); check the name, the network (HF_HUB_OFFLINE?) and your access."
        ) from error
    finally:
        log.setLevel(level)
