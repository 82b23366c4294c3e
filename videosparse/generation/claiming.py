"""One process at a time for a file that takes hours to make: `claimed`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from videosparse.generation.errors import GenerationError, unwritable

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Be the only process that makes a file, for the time of a block; its folder is there meanwhile.

    The claim is an advisory lock on `.<name>.lock` beside the file, which the system lets go of when the process ends,
    however it does: a lock file that is left behind claims nothing. Folders that were made for the block and are empty
    at its end go again. Where the system or the file system has no such locks, nobody is kept away.

    Raises:
        GenerationError: another one makes the file, or nothing can be written there.
    """
    folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        lock = _make(path.parent, path.with_name(f".{path.name}.lock"))
        try:
            if lock is None:
                raise GenerationError(
                    f"Another process is making {path} just now; wait until it has ended, or choose another name."
                )
            yield
        finally:
            if lock is not None:
                _release(*lock)
    finally:
        for folder in folders:
            with suppress(OSError):  # not empty: something was written
                folder.rmdir()


def _make(folder: Path, place: Path) -> tuple[int, Path] | None:
    """The locked file, open; None where another process holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free = _lock(file)
                if free and _is(file, place):
                    return file, place
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            if not free:
                return None
    except OSError as error:
        raise unwritable(place, error) from error


def _lock(file: int) -> bool:
    """Lock an open file; False where another process has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is(file: int, place: Path) -> bool:
    """Whether an open file still has its name: who held the lock before removes it at the end."""
    try:
        return os.path.samestat(os.fstat(file), place.stat())
    except FileNotFoundError:
        return False


def _release(file: int, place: Path) -> None:
    """Remove the lock file, then let go of it: in the other order it could be another's already."""
    with suppress(OSError):
        place.unlink(missing_ok=True)
    os.close(file)
