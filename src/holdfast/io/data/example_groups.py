"""The group of each example of a data set, such as its value in the column `sex` of a table."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.core.spelling import most_similar
from holdfast.io.data.columns import Words, number_of
from holdfast.io.files import names_of

MOST_GROUPS = 50
"""Largest number of groups. Simultaneous intervals of more groups are wide, and each group has its own letter."""
MISSING = "missing"
"""Name of the group of the examples without a value."""
_LETTERS = string.ascii_letters


@dataclass(frozen=True)
class Groups:
    """The group of each example of a data set."""

    names: tuple[str, ...]
    places: NDArray[np.int64]
    """(n,) indices in `names`"""
    column: str = ""
    """name of the column or array that states the groups; empty for an array that was given in Python"""
    absent: tuple[str, ...] = ()
    """names of the groups of the source without an example"""

    @classmethod
    def of_values(cls, values: NDArray[Any], column: str = "") -> "Groups":
        """Return the groups of examples by their values (n,). Examples without a value are the group `missing`.

        Raises `UsageError` for values with more than one axis.
        """
        if values.ndim != 1:
            raise UsageError(
                f"{_called(column)} has the shape {values.shape}; one value for each example was expected, as in (100,)"
            )
        distinct, places = np.unique(
            values.astype(str) if values.dtype.kind == "S" else values, return_inverse=True
        )
        return cls.of_words(Words(tuple(map(_text, distinct.tolist())), places.astype(np.int32)), column)

    @classmethod
    def of_words(cls, words: Words, column: str) -> "Groups":
        """Return the groups of the rows of a table by their strings in a column."""
        used, places = np.unique(words.places, return_inverse=True)
        texts = [words.words[place].strip() for place in used]
        shown = [MISSING if not text or text.lower() == "nan" else text for text in texts]
        names = sorted({*shown}, key=_order)
        indices = {name: place for place, name in enumerate(names)}
        return cls(tuple(names), np.array([indices[name] for name in shown], np.int64)[places], column)

    def taken(self, rows: Any) -> "Groups":
        """Return the groups of the examples in the given rows."""
        return replace(self, places=self.places[np.asarray(rows, dtype=np.int64)])

    def refuse_unusable(self) -> "Groups":
        """Return the groups that occur. Raise `UsageError` if only one occurs, or more than 50."""
        occurring, places = np.unique(self.places, return_inverse=True)
        if len(occurring) > MOST_GROUPS:
            raise UsageError(
                f"{_called(self.column)} has {len(occurring):,} different values; at most {MOST_GROUPS} groups were "
                "expected: give a column of categories, such as ranges of a number"
            )
        if len(occurring) < 2:
            raise UsageError(
                f"{_called(self.column)} is {self.names[occurring[0]]!r} for all {len(self.places):,} examples; at "
                "least two groups were expected",
                Remedy("groups"),
            )
        names = tuple(self.names[place] for place in occurring)
        return replace(
            self, names=names, places=places, absent=tuple(n for n in self.names if n not in names)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the groups for a manifest: `of` has one letter for each example, `a` for the first group."""
        of = "".join(_LETTERS[place] for place in self.places)
        return {"column": self.column, "names": list(self.names), "of": of, "absent": list(self.absent)}


def refuse_unknown(name: str, known: Sequence[str], where: str) -> None:
    """Raise `UsageError` if the data `where` have no column or array of the groups with this name."""
    if name not in known:
        raise UsageError(
            f"{where} has no column or array {name!r} of groups; it has {names_of(known)}",
            Remedy("groups", most_similar(name, known) or Placeholder("NAME")),
        )


def places_of_letters(letters: str, n_groups: int) -> NDArray[np.int64]:
    """Return the index of the group of each example from the letters in a manifest. Raises `TargetError` for a letter
    of no group.
    """
    wrong = {*letters} - {*_LETTERS[:n_groups]}
    if wrong:
        raise TargetError(
            f"the groups of the examples are {n_groups}, and a letter of them is {min(wrong)!r}; one of "
            f"{_LETTERS[:n_groups]} was expected"
        )
    return np.array([_LETTERS.index(letter) for letter in letters], np.int64)


def _called(column: str) -> str:
    return f"the group {column!r}" if column else "groups"


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _order(name: str) -> tuple[bool, bool, float, str]:
    """Order of groups: numbers, then names, and the group without a value last."""
    number = number_of(name)
    return name == MISSING, number is None, 0.0 if number is None else number, name
