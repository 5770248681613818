"""Columns of a table as numbers and as words.

The module does not import torch, so that the reading process starts fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPLIT_COLUMN = "split"
"""name of the column that assigns rows to train and test"""
NUMBER, MISSING, TEXT = 0, 1, 2
"""kinds of a cell in a feature column"""
_TRUTH: Mapping[str, float] = {"true": 1.0, "false": 0.0}
"""booleans as written by pandas and pyarrow"""


@dataclass(frozen=True)
class Words:
    """A text column: its distinct words, and the index of the word in each row."""

    words: tuple[str, ...]
    places: NDArray[np.int32]
    """(rows,)"""


@dataclass(frozen=True)
class ColumnTable:
    """A table: columns of labels and splits as words, features as numbers."""

    name: str
    """name for messages"""
    columns: tuple[str, ...]
    """names of all columns, in the order of the file"""
    features: tuple[str, ...] = ()
    """names of the columns in `numbers`"""
    numbers: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """(rows, features); NaN for a cell that is not a number"""
    kinds: NDArray[np.uint8] | None = None
    """(rows, features): `NUMBER`, `MISSING` or `TEXT`; None if all cells are numbers"""
    words: Mapping[str, Words] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)


def as_numbers(cells: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Return the cells of a feature as float32, with NaN for cells that are not numbers, and the kinds of the cells.

    The kinds are None if all cells are numbers.
    """
    try:
        return rounded(list(map(float, cells))), None
    except ValueError:
        found = [_number(cell) for cell in cells]
    kinds = [
        NUMBER if number is not None else TEXT if cell.strip() else MISSING
        for cell, number in zip(cells, found, strict=True)
    ]
    values = rounded([np.nan if number is None else number for number in found])
    return values, np.array(kinds, np.uint8) if any(kinds) else None


def side_by_side(
    columns: Sequence[tuple[NDArray[np.float32], NDArray[np.uint8] | None]], rows: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Numbers and kinds of all cells, each of shape (rows, columns), of columns that `as_numbers` returned."""
    numbers = np.empty((rows, len(columns)), np.float32)
    kinds = np.full((rows, len(columns)), NUMBER, np.uint8)
    for place, (values, found) in enumerate(columns):
        numbers[:, place] = values
        if found is not None:
            kinds[:, place] = found
    return numbers, kinds


def as_words(cells: Sequence[str], known: dict[str, int]) -> NDArray[np.int32]:
    """Return the index of each cell in `known`, to which new words are added."""
    return np.array([known.setdefault(cell, len(known)) for cell in cells], np.int32)


def number_of(text: str) -> float | None:
    """The text as a number; None if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return None


def _number(cell: str) -> float | None:
    truth = _TRUTH.get(cell.lower())
    return number_of(cell) if truth is None else truth


def rounded(values: ArrayLike) -> NDArray[np.float32]:
    """Numbers as float32, rounded from float64; infinite outside its range."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32)
