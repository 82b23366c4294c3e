"""Deep copies of what refers weakly: `in_copy`."""

from __future__ import annotations

import weakref
from typing import Any


def in_copy(ref: weakref.ref[Any], memo: dict[int, Any]) -> weakref.ref[Any]:
    """A weak reference of a deep copy: to the copy of what `ref` refers to, if that was begun before, else `ref`.

    Args:
        ref: what `copy.deepcopy` would take as it is, so that the copy followed the original.
        memo: of `copy.deepcopy`, which knows an object's copy from when it begins to fill it.
    """
    copied = memo.get(id(ref()))
    return ref if copied is None else weakref.ref(copied)
