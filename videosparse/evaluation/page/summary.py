"""Rows of a comparison by size and setting, and their means with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from videosparse.evaluation.judging import QUARTERS
from videosparse.evaluation.table import Row, check_counts, number
from videosparse.metrics.bootstrap import Interval, interval

NEEDED = ("model", "setting", "method", "prompt", "seed", "frames", "height", "width", "steps", "guidance", "block")
"""Columns that a page cannot do without."""


@dataclass(frozen=True, eq=False)
class Group:
    """The videos of one setting at one size.

    Args:
        setting: its name.
        rows: at least one.
    """

    setting: str
    rows: Sequence[Row]

    @property
    def method(self) -> str:
        """Of the setting, such as "adaspa"."""
        return self.rows[0]["method"]

    @property
    def quant(self) -> str:
        """As in `KernelOptions`, "" for none."""
        return self.rows[0].get("quant", "")

    @property
    def series(self) -> str:
        """Which settings are one method at several densities: the name less the density."""
        name = self.setting.replace(", density of radial", "")
        asked = self.rows[0].get("asked_density", "")
        words = name.split(" ", 1)
        if asked and len(words) > 1:
            rest = words[1].partition(",")
            return words[0] + rest[1] + rest[2]
        return name

    @property
    def is_sparse(self) -> bool:
        """Whether it is a method rather than an anchor without a density."""
        return self.method not in ("dense", "ceiling", "other-noise")

    def mean(self, name: str) -> Interval | None:
        """Mean of a column over the videos that have a value; None where none has."""
        values = [value for row in self.rows if (value := number(row, name)) is not None]
        return interval(values) if values else None

    def difference(self, other: Group, name: str) -> Interval | None:
        """Mean of a column less that of another setting, prompt by prompt; None where they share no video."""
        theirs = {(row["prompt"], row["seed"]): number(row, name) for row in other.rows}
        pairs = [(number(row, name), theirs.get((row["prompt"], row["seed"]))) for row in self.rows]
        found = [a - b for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
        return interval(found) if found else None

    def quarters(self, name: str) -> list[Interval | None]:
        """Means of a column that comes by quarter."""
        return [self.mean(f"{name}_q{q}") for q in range(1, QUARTERS + 1)]

    def drift(self) -> list[tuple[float, Interval]]:
        """Seconds from the beginning, and the mean likeness to it: the drift curve of its videos."""
        found: dict[float, list[float]] = {}
        for row in self.rows:
            for pair in row.get("drift", "").split():
                seconds, _, cosine = pair.partition(":")
                found.setdefault(float(seconds), []).append(float(cosine))
        return [(seconds, interval(values)) for seconds, values in sorted(found.items())]


@dataclass(frozen=True, eq=False)
class Size:
    """All settings at one size, with one model and schedule.

    Args:
        key: the columns that its rows share.
        groups: by setting, in the order of the rows.
    """

    key: dict[str, str]
    groups: Sequence[Group]

    @property
    def title(self) -> str:
        """Such as "81 frames of 128 x 128"."""
        return f"{self.key['frames']} frames of {self.key['height']} × {self.key['width']}"

    @property
    def anchor(self) -> str:
        """For links within the page."""
        return "-".join(self.key.values()).replace(".", "_").replace(" ", "_").replace("/", "_")

    @property
    def about(self) -> str:
        """What else the videos share."""
        first, key = self.groups[0].rows[0], self.key
        count = len({(row["prompt"], row["seed"]) for group in self.groups for row in group.rows if group.is_sparse})
        tokens = f"{int(first['tokens']):,} video tokens, " if first.get("tokens") else ""
        return (
            f"{key['model']}, {tokens}{key['steps']} steps, guidance {key['guidance']}, blocks of {key['block']}; "
            f"{count} {'video' if count == 1 else 'videos'} a method"
        )

    def group(self, method: str, asked: str | None = None) -> Group | None:
        """The first setting of a method, with an asked density where that is given."""
        same = (g for g in self.groups if g.method == method)
        return next((g for g in same if asked is None or g.rows[0].get("asked_density", "") == asked), None)


def sizes_of(rows: Sequence[Row]) -> list[Size]:
    """Rows by model and size, shorter videos first; settings in the order of the rows.

    Raises:
        ValueError: frames, height or width is no whole number.
    """
    check_counts(rows, ("frames", "height", "width"))
    names = ("model", "frames", "height", "width", "steps", "guidance", "block", "first_steps")
    keys = dict.fromkeys(tuple(row.get(name, "") for name in names) for row in rows)
    sizes = []
    for key in keys:
        own = [row for row in rows if tuple(row.get(name, "") for name in names) == key]
        settings = dict.fromkeys(row["setting"] for row in own)
        groups = [Group(s, [row for row in own if row["setting"] == s]) for s in settings]
        sizes.append(Size(dict(zip(names, key, strict=True)), groups))
    return sorted(sizes, key=lambda size: (size.key["model"], int(size.key["frames"]), int(size.key["height"])))
