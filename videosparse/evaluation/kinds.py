"""What the rows of one table have in common, so that a name in it means one thing: `Kinds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Kinds:
    """The weights and dtype of each model, and what all rows share; rows that say otherwise are refused.

    What a row does not say counts as a value of its own: nobody knows that it is the same.

    Args:
        of_model: columns in which all rows of one model agree.
        of_all: columns in which all rows agree.
    """

    def __init__(self, of_model: Sequence[str] = (), of_all: Sequence[str] = ()) -> None:
        self.of_model, self.of_all = tuple(of_model), tuple(of_all)
        self._known: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, row: Mapping[str, Any], place: str, advice: str) -> None:
        """Take note of a row.

        Args:
            row: a column that it lacks is empty.
            place: where it is, as the message calls it.
            advice: what to do where it is refused.

        Raises:
            ValueError: a row that was noted before says otherwise; one line for people.
        """
        self.check(row, place, advice)
        for mark in self._marks(row):
            self._known.setdefault(mark, (_text(row, mark[1]), place))

    def check(self, row: Mapping[str, Any], place: str, advice: str) -> None:
        """`add` without taking note."""
        for model, name in self._marks(row):
            before, where = self._known.get((model, name), (_text(row, name), place))
            if before != _text(row, name):
                of, there = f" of {model}" if model else "", "others" if where == place else place
                now = _told(name, _text(row, name))
                raise ValueError(f"{where} has rows{of} with {_told(name, before)}, {there} with {now}; {advice}")

    def copy(self) -> Kinds:
        """The same, to add to."""
        made = Kinds(self.of_model, self.of_all)
        made._known = dict(self._known)
        return made

    def _marks(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(model, column) of what is compared; ("", column) for what all rows share."""
        own = [(str(row["model"]), name) for name in self.of_model]
        return own + [("", name) for name in self.of_all]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else str(value)


def _told(name: str, value: str) -> str:
    return f"{name} {value}" if value else f"no {name}"
