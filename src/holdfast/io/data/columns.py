"""Converts the columns of a table to numbers, or to indices of their distinct strings.

The module does not import torch, so that the process that reads the table starts fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPLIT_COLUMN = "split"
"""Name of the column that assigns rows to the train and test split."""
MOST_CHARACTERS = 10_000_000
"""Largest total number of characters of the names of classes; comparing them takes a hundred times their memory."""
NUMBER, MISSING, TEXT, INEXACT = 0, 1, 2, 3
"""Kinds of a cell in a feature column; `INEXACT` is a number that loses information as float32."""
EXACT = 1 << 24
"""Largest number up to which float32 represents all whole numbers."""
_NOTICEABLE = 1e-3
"""rounding error in standard deviations of its column above which a number loses information"""
_LARGEST = 2.0**63
"""absolute value from which numbers are no integers of a database or of pandas, but floats"""
_TRUTH: Mapping[str, float] = {"true": 1.0, "false": 0.0}
"""Values of the strings that pandas and pyarrow write for booleans."""


@dataclass(frozen=True)
class Words:
    """A column of strings in compact form: the distinct strings, and for each row the index of its string."""

    words: tuple[str, ...]
    places: NDArray[np.int32]
    """(rows,) indices in `words`"""


@dataclass(frozen=True)
class ColumnInputs:
    """A column of a table in which each cell contains a whole input: the file of an image, or an array."""

    column: str
    unread: tuple[str, ...]
    """names of the other columns, which are not read"""
    cells: Sequence[bytes] | NDArray[np.uint8] | NDArray[np.float32]
    """contents of the files of images, or the arrays (rows, …)"""


@dataclass(frozen=True)
class ColumnTable:
    """A table after conversion: features are numbers, and the columns with labels and splits contain strings."""

    name: str
    """name of the table in messages"""
    columns: tuple[str, ...]
    """names of all columns, in the order of the file"""
    features: tuple[str, ...] = ()
    """names of the columns in `numbers`"""
    numbers: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """(rows, features); NaN for a cell that is not a number"""
    kinds: NDArray[np.uint8] | None = None
    """(rows, features): `NUMBER`, `MISSING` or `TEXT`; None if all cells are numbers"""
    words: Mapping[str, Words] = field(default_factory=dict)
    inputs: ColumnInputs | None = None
    """column whose cells are the inputs, if there is one; the table then has no features"""
    has_header: bool = True
    """whether the file contains the names of the columns; otherwise they are the positions of the columns"""

    def __len__(self) -> int:
        return len(self.numbers)


def as_numbers(cells: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.uint8] | None]:
    """Convert the cells of a table column to float64, with NaN for cells that are not numbers. Also return for each
    cell whether it is a number, missing or text.

    The kinds are None if all cells are numbers.
    """
    try:
        # One pass over all cells is the common and fast case; cells are examined one by one only if it fails.
        return np.array(list(map(float, cells)), np.float64), None
    except ValueError:
        numbers_or_none = [_number(cell) for cell in cells]
    kinds = [
        NUMBER if number is not None else TEXT if cell.strip() else MISSING
        for cell, number in zip(cells, numbers_or_none, strict=True)
    ]
    values = np.array([np.nan if number is None else number for number in numbers_or_none], np.float64)
    return values, np.array(kinds, np.uint8) if any(kinds) else None


def side_by_side(
    columns: Sequence[tuple[NDArray[np.float64], NDArray[np.uint8] | None]], rows: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Stack table columns that `as_numbers` converted. Return their values as float32, and whether each cell is a
    number, missing, text or a number that loses information as float32, both of shape (rows, columns).
    """
    numbers = np.empty((rows, len(columns)), np.float32)
    kinds = np.full((rows, len(columns)), NUMBER, np.uint8)
    for place, (values, cell_kinds) in enumerate(columns):
        numbers[:, place] = rounded(values)
        if cell_kinds is not None:
            kinds[:, place] = cell_kinds
        kinds[inexact(values), place] = INEXACT
    return numbers, kinds


def inexact(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which numbers (n,) of a column lose information as float32: the whole numbers above `EXACT` that float32
    does not represent, and in a column with fractions, the numbers above `EXACT` whose rounding error is noticeable
    beside the spread of the column, such as that of times in seconds.
    """
    lost: NDArray[np.bool_] = (np.abs(values) > EXACT) & (np.abs(values) < _LARGEST)
    if lost.any():
        finite = values[np.isfinite(values)]
        whole = bool((finite == np.round(finite)).all())
        most = 0.0 if whole else _NOTICEABLE * float(finite.std())
        lost[lost] = np.abs(values[lost] - rounded(values[lost])) > most
    return lost


def as_words(cells: Sequence[str], known: dict[str, int]) -> NDArray[np.int32]:
    """Return the index in `known` of the string in each cell of a table column. Strings that are not yet in `known` are
    added to it.
    """
    return np.array([known.setdefault(cell, len(known)) for cell in cells], np.int32)


def number_of(text: str) -> float | None:
    """Return the number that a string represents, or None if it does not represent one."""
    try:
        return float(text)
    except ValueError:
        return None


def _number(cell: str) -> float | None:
    truth = _TRUTH.get(cell.lower())
    return number_of(cell) if truth is None else truth


def rounded(values: ArrayLike) -> NDArray[np.float32]:
    """Round float64 values to float32. Values outside the range of float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32)
