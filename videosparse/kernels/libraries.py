"""Importing libraries that need not be there."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def import_library(name: str) -> tuple[Any, str | None]:
    """(module, None), or (None, why it cannot be imported). Asked once: a broken installation stays broken."""
    try:
        return importlib.import_module(name), None
    except Exception as error:  # beside ImportError: linker errors, version checks, missing drivers
        return None, f"{type(error).__name__}: {error}"
