"""Parts of messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def install_extra(extra: str) -> str:
    """The command that installs an extra of pyproject.toml: from a clone, since no index has the package."""
    return f'pip install -e ".[{extra}]" in the clone'


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ("Did you mean 'x'?" after a space) at the shortest known word that begins with `word`, or else at the one
    that is most like it; empty when none is close."""
    lowered = {name.lower(): name for name in known}
    asked = word.lower()
    begins = [name for name in lowered if len(asked) > 1 and name.startswith(asked)]
    match = sorted(begins, key=len) or difflib.get_close_matches(asked, lowered, n=1, cutoff=0.6)
    return f" Did you mean {lowered[match[0]]!r}?" if match else ""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of any error on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
