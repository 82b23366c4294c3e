"""Files that appear whole or not at all, and take no other file's place unasked."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EMLINK)


def write_whole(path: str | Path, data: bytes, overwrite: bool) -> None:
    """Write a file under another name beside it, then give it its own.

    Raises:
        FileExistsError: it is there, and not to be overwritten.
        OSError: it cannot be written. Nothing is left behind then, nor after Ctrl-C.
    """
    final = Path(path)
    part = final.with_name(f".{secrets.token_hex(6)}.part")  # no longer for a long name
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            part.replace(final)
        else:
            give_name(part, final)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def give_name(part: Path, final: Path) -> None:
    """Give a finished file its name, where no file has it; `part` may stay as a second name of it.

    A hard link fails when the name exists, which a rename does not; some file systems have no links.

    Raises:
        FileExistsError: the name is taken.
        OSError: it cannot be given.
    """
    try:
        os.link(part, final)
    except FileExistsError:
        raise _exists(final) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(final):
            raise _exists(final) from None
        part.rename(final)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; choose another name, or pass --overwrite.")
