"""Where results go: names that overwrite nothing by accident, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from videosparse.generation.errors import GenerationError, reason_of, unwritable
from videosparse.generation.filing import ENDINGS, leftovers
from videosparse.writing import give_name

DEFAULT_FOLDER = "outputs"

WHOLE = 200
"""Letters of a name that has to tell things apart; file systems take 255."""

_SHOWN = 40

Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Destination:
    """Names of the files of one run: they share a stem and differ in the ending.

    Args:
        folder: where they go; made when the files are.
        stem: name without ending.
        endings: of the files, such as (".mp4", ".json").
        number: whether a taken stem is numbered ("x-2.mp4") or refused.
        overwrite: whether existing files may be replaced. Those of a video that its new run does not make go, too: they
            would be taken for the new run's. Where the video is gone, only its record does.
        fingerprint: of an earlier run that the new files belong to: its others stay.
    """

    folder: Path
    stem: str
    endings: tuple[str, ...]
    number: bool = False
    overwrite: bool = False
    fingerprint: str | None = None

    def publish(self, writers: Mapping[str, Writer]) -> dict[str, Path]:
        """Write all files under temporary names in the same folder, then give them their names.

        Args:
            writers: for each ending a function that writes the file at the path it is given.

        Returns:
            The final path of each ending.

        Raises:
            GenerationError: see `parts`.
        """
        with self.parts() as parts:
            for ending, write in writers.items():
                write(parts.path(ending))
            return parts.publish()

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        """Temporary files in the same folder, for the time of a block that writes them and then publishes them.

        Raises:
            GenerationError: a name is taken, or the folder cannot be written. No file is left behind then, nor after
                any other error or Ctrl-C.
        """
        try:
            with self.files() as parts:
                yield parts
        except OSError as error:
            raise unwritable(f"to {self.folder}", error) from error

    @contextmanager
    def files(self) -> Iterator[Parts]:
        """`parts` for a block that runs other people's code, whose OSErrors are about something else."""
        parts, is_new = Parts(self), not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield parts
        finally:
            parts.discard()
            if is_new:
                with suppress(OSError):  # not empty: there are results in it
                    self.folder.rmdir()

    def taken(self, stem: str) -> list[Path]:
        """Existing files of that stem, and those of an earlier run that would be taken for the new video's."""
        found = [path for ending in self.endings if os.path.lexists(path := self.folder / f"{stem}{ending}")]
        return [*found, *self._leftovers(stem, self.endings)]

    def _leftovers(self, stem: str, written: Collection[str]) -> list[Path]:
        return leftovers(self.folder, stem, written, self.fingerprint) if ".mp4" in written else []

    def _replaced(self, stem: str, written: Collection[str]) -> list[Path]:
        """What goes when a video is overwritten; where it is gone, its latents may be all that is left of it."""
        found = self._leftovers(stem, written)
        if os.path.lexists(self.folder / f"{stem}.mp4"):
            return found
        return [path for path in found if path.suffix == ".json"]

    def name(self, parts: Mapping[str, Path]) -> dict[str, Path]:
        """Move the finished files; another run may have taken the name meanwhile."""
        attempt = 1
        while True:
            stem = self.stem if attempt == 1 else f"{self.stem}-{attempt}"
            finals = {ending: self.folder / f"{stem}{ending}" for ending in parts}
            if self.overwrite:
                _check_replaceable(finals.values())
                before = self._replaced(stem, finals)
                for ending, part in parts.items():
                    part.replace(finals[ending])
                for path in before:
                    path.unlink(missing_ok=True)
                return finals
            if not self.taken(stem) and _link_all([(parts[e], finals[e]) for e in parts]):
                return finals
            if not self.number:
                raise _exists(self.taken(stem) or list(finals.values()))
            attempt += 1


class Parts:
    """Files that are being written; see `Destination.parts`."""

    def __init__(self, place: Destination) -> None:
        self._place = place
        self._paths: dict[str, Path] = {}

    def path(self, ending: str) -> Path:
        """Where to write the file of an ending; nothing is there yet."""
        self._paths[ending] = self._place.folder / f".{secrets.token_hex(6)}.part{ending}"
        return self._paths[ending]

    def publish(self) -> dict[str, Path]:
        """Give all files their final names, which are returned by ending."""
        return self._place.name(self._paths)

    def discard(self) -> None:
        """Delete what was not published."""
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def destination(
    output: str | Path | None,
    default_stem: str,
    endings: tuple[str, ...] = ENDINGS,
    overwrite: bool = False,
    fingerprint: str | None = None,
) -> Destination:
    """Decide where results go, before anything expensive runs.

    Args:
        output: an .mp4 file, a folder (exists, or ends in a slash), or None for outputs/.
        default_stem: file name where `output` gives none; numbered when it is taken.
        endings, overwrite, fingerprint: see `Destination`.

    Raises:
        GenerationError: another ending, a name that is taken and not to be overwritten, or a folder that cannot be
            written.
    """
    text = "" if output is None else str(output)
    if output is not None and not text.strip():
        raise GenerationError("--output must not be empty; give an .mp4 file or a folder, or leave it out.")
    is_folder = output is None or text.endswith(("/", os.sep)) or _is_folder(text)
    if is_folder:
        folder, stem = Path(text or DEFAULT_FOLDER), default_stem
    else:
        path = Path(text)
        if path.suffix != ".mp4":
            raise GenerationError(f"--output must end in .mp4, or be a folder (got {text!r}); use {path.stem}.mp4.")
        folder, stem = path.parent, path.stem
    numbered = is_folder and not overwrite
    place = Destination(folder, stem, endings, number=numbered, overwrite=overwrite, fingerprint=fingerprint)
    check_places([place])
    return place


def video_place(
    output: str | Path | None,
    prompt: str,
    seed: int,
    method: str,
    *,
    endings: tuple[str, ...] = (".mp4",),
    overwrite: bool = False,
) -> Destination:
    """Where the files of one video go; PROMPT-SEED-METHOD where `output` gives no name. See `destination`.

    Raises:
        GenerationError: see `destination`.
    """
    return destination(output, f"{slug(prompt)}-{seed}-{method}", endings, overwrite)


def picture_place(output: str | Path, overwrite: bool = False) -> Destination:
    """Where one .png goes; decided before anything runs, as for `destination`.

    Raises:
        GenerationError: see `destination`.
    """
    path = Path(output)
    if path.suffix != ".png":
        raise GenerationError(f"A picture must end in .png (got {str(output)!r}); use {path.stem}.png.")
    place = Destination(path.parent, path.stem, (".png",), overwrite=overwrite)
    check_places([place])
    return place


def slug(text: str, limit: int = 40) -> str:
    """A file name from any text: lower-case words and numbers joined by dashes, cut between words to `limit` letters.

    Letters lose their accents, and those of other alphabets are left out. It is "video" when nothing is left.
    """
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    words = re.findall(r"[0-9]+\.[0-9]+|[a-z0-9]+", plain.lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:limit]
        if len(longer) > limit:
            break
        name = longer
    return name or "video"


def _link_all(moves: list[tuple[Path, Path]]) -> bool:
    """Give every file its final name without replacing any; False, and nothing done, when one is taken."""
    done: list[Path] = []
    try:
        for part, final in moves:
            give_name(part, final)
            done.append(final)
    except BaseException as error:
        for final in done:
            final.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def _exists(paths: list[Path]) -> GenerationError:
    return GenerationError(f"{paths[0]} exists; choose another name, or pass --overwrite.")


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except (OSError, ValueError) as error:  # too long a name
        raise GenerationError(f"Cannot write to {text[:_SHOWN]!r}: {reason_of(error)}; choose another name.") from None


def check_places(places: Sequence[Destination]) -> None:
    """Learn before anything runs what `publish` would find out, for places in one folder.

    Raises:
        GenerationError: a taken name, or a folder that cannot be written.
    """
    for place in places:
        if place.overwrite:
            _check_replaceable(place.taken(place.stem))
        elif not place.number and (found := place.taken(place.stem)):
            raise _exists(found)
    check_writable(places[0].folder, [f"{place.stem}{ending}" for place in places for ending in place.endings])


def _check_replaceable(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise GenerationError(f"Cannot overwrite {path}: it is a folder; choose another name.")


def check_place(path: Path) -> None:
    """Raise GenerationError unless a file can be written here, which may be there already; nothing is left behind."""
    if path.is_dir():
        raise GenerationError(f"Cannot write to {path}: it is a folder; choose another name.")
    check_writable(path.parent, [path.name])


def check_writable(folder: Path, names: Iterable[str] = ()) -> None:
    """Whether a folder, which may not be there yet, can take files of these names; nothing is left behind.

    It is tried: permissions alone do not tell of read-only file systems or of names that are too long.

    Raises:
        GenerationError: it cannot.
    """
    existing, name = folder.absolute(), ""
    missing: list[str] = []
    try:
        while not os.path.lexists(existing):
            missing.append(existing.name)
            existing = existing.parent
        if not existing.is_dir():
            raise GenerationError(f"Cannot write to {folder}: {existing} is not a folder; choose another folder.")
        with tempfile.TemporaryDirectory(prefix=".", dir=existing) as probe:
            for part in missing:
                (Path(probe) / part).mkdir(exist_ok=True)
            place = tempfile.mkdtemp(dir=probe)
            for name in names:
                (Path(place) / name).touch()
    except (OSError, ValueError) as error:  # such as a name with a null character
        if isinstance(error, GenerationError):
            raise
        raise _refused(folder, name, error) from error


def _refused(folder: Path, name: str, error: OSError | ValueError) -> GenerationError:
    """That a folder takes no file, or none of that name; "" for a folder that takes none at all."""
    if name and (isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        return GenerationError(
            f"Cannot write to {folder}: the name {shown!r} is not possible ({reason_of(error)}); choose another, "
            "shorter name."
        )
    return unwritable(f"to {folder}", error)
