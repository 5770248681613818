"""Tables whose columns are numbers or categories, such as synthetic tables and the tables that they imitate."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import NoSplit, Remedy, TargetError, UsageError
from holdfast.core.names import by_stripped, note_on_spaces
from holdfast.core.types import Mask
from holdfast.io.data.columns import SPLIT_COLUMN, TEXT, ColumnTable, Words, as_numbers
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.tables import read_table
from holdfast.io.files import names_of, similar_name

_LISTED = 20  # most columns that advice names
_CATEGORY = 0.5
"""Weight of a category in the encoded columns: two different values have an L1 distance of 1, as the ends of the range
of a number have."""

_MOST = 1000
"""Largest number of values of a category; each is a feature."""


@dataclass(frozen=True)
class Column:
    """A column that several tables have."""

    name: str
    values: tuple[str, ...] = ()
    """values of a category in all tables; empty for numbers"""


@dataclass(frozen=True)
class MixedTables:
    """Several tables with the same columns."""

    columns: tuple[Column, ...]
    rows: tuple[Tensor, ...]
    """for each table (n, columns): numbers, and positions in the values of categories"""
    notes: tuple[str, ...] = ()

    @property
    def numeric(self) -> Mask:
        """Which columns are numbers (columns)."""
        return torch.tensor([not column.values for column in self.columns])

    def selected(self, place: int, rows: NDArray[np.int64]) -> "MixedTables":
        """Return the tables with some of the rows of one of them."""
        chosen = [table[torch.from_numpy(rows)] if k == place else table for k, table in enumerate(self.rows)]
        return MixedTables(self.columns, tuple(chosen))

    def encoded(self, like: int) -> list[Tensor]:
        """Return each table as features (n, d): numbers from 0 to 1 in the range of table `like`, and an indicator for
        each value of a category, which is 0 or 0.5.
        """
        low, high = self.rows[like].min(0).values, self.rows[like].max(0).values
        width = torch.where(high > low, high - low, 1.0)
        return [
            torch.cat(
                [
                    _CATEGORY * torch.nn.functional.one_hot(table[:, c].long(), len(column.values))
                    if column.values
                    else (table[:, c, None] - low[c]) / width[c]
                    for c, column in enumerate(self.columns)
                ],
                1,
            ).float()
            for table in self.rows
        ]


@dataclass(frozen=True)
class TableFile:
    """Where a table is, and how it is read."""

    path: Path
    split: str | None = None
    """split whose rows are read; None for the usual one"""
    usual: str | None = None
    """split that is read if the table has a column of splits and none is chosen; None for all rows"""
    separator: str | None = None
    header: bool = True


def open_mixed(files: Sequence[TableFile], drop: Sequence[str]) -> MixedTables:
    """Return tables whose columns are numbers if all their cells are, in every table, and else categories. An empty
    cell of a category is a value like others. The columns `drop` and the one that assigns rows to splits are left out.

    Raises `UsageError` if a table has other columns than the first, `NoSplit` if it lacks a split, and
    `TargetError` for numbers that are missing.
    """
    tables = [_read(file, drop) for file in files]
    names = [name for name in tables[0].columns if name not in (SPLIT_COLUMN, *drop)]
    _refuse_other_columns(tables, names, drop)
    rows = [_rows_of(table, file) for table, file in zip(tables, files, strict=True)]
    columns, values, notes = [], [], tuple[str, ...]()
    for name in names:
        column, cells, on_spaces = _column(name, [table.words[name] for table in tables], files)
        columns.append(column)
        values.append(cells)
        notes += on_spaces
    return MixedTables(
        tuple(columns),
        tuple(
            torch.from_numpy(np.stack([cells[t][rows[t]] for cells in values], 1)) for t in range(len(tables))
        ),
        notes,
    )


def _read(file: TableFile, drop: Sequence[str]) -> ColumnTable:
    read = partial(read_table, file.path, separator=file.separator, header=file.header)
    header = read(label=None, expected=DeclaredData()).columns
    kept = [name for name in header if name not in (SPLIT_COLUMN, *drop)]
    if not kept:
        raise UsageError(
            f"{str(file.path)!r} has no column besides {names_of(header)}; at least one is needed"
        )
    present = tuple(name for name in drop if name in header)
    return read(label=kept[0], drop=present, expected=DeclaredData(words=None))


def _refuse_other_columns(tables: Sequence[ColumnTable], names: Sequence[str], drop: Sequence[str]) -> None:
    for unknown in (name for name in drop if name not in tables[0].columns):
        raise UsageError(
            f"{tables[0].name} has no column {unknown!r} to drop{similar_name(unknown, tables[0].columns)}"
        )
    for table in tables[1:]:
        own = [name for name in table.columns if name not in (SPLIT_COLUMN, *drop)]
        if {*own} != {*names}:
            missing, extra = ([n for n in a if n not in b] for a, b in ((names, own), (own, names)))
            shown = [
                f"{verb} {names_of(some)}"
                for verb, some in (("lacks", missing), ("has other columns:", extra))
                if some
            ]
            differing = (*missing, *extra)
            raise UsageError(
                f"{table.name} {' and '.join(shown)}; the columns of {tables[0].name} were expected: {names_of(names)}",
                *([Remedy("drop", differing, repeated=True)] if len(differing) <= _LISTED else []),
            )


def _rows_of(table: ColumnTable, file: TableFile) -> NDArray[np.int64]:
    splits, split = table.words.get(SPLIT_COLUMN), file.split or file.usual
    if splits is None or split is None:
        if file.split is not None:
            raise NoSplit(
                f"{table.name} has no column {SPLIT_COLUMN!r}, and the split {file.split!r} is chosen"
            )
        return np.arange(len(table), dtype=np.int64)
    if split not in splits.words:
        raise NoSplit(f"{table.name} has no split {split!r}; it has {names_of(sorted(splits.words))}")
    return np.flatnonzero(splits.places == splits.words.index(split)).astype(np.int64)


def _column(
    name: str, parts: Sequence[Words], files: Sequence[TableFile]
) -> tuple[Column, list[NDArray[np.float64]], tuple[str, ...]]:
    """The column, its cells in each table as numbers or positions, and notes."""
    found = [as_numbers(part.words) for part in parts]
    texts = [kinds is not None and bool((kinds == TEXT).any()) for _, kinds in found]
    if any(texts):
        read_as = by_stripped(word for part in parts for word in part.words)
        values = sorted({*read_as.values()})
        if len(values) > _MOST:
            raise UsageError(
                f"the column {name!r} has {len(values):,} different texts; at most {_MOST:,} were expected, the "
                "values of a category: leave out columns with names or ids"
            )
        place = {word: float(position) for position, word in enumerate(values)}
        of_tables = [np.array([place[read_as[word]] for word in part.words])[part.places] for part in parts]
        notes = note_on_spaces(f"the column {name!r}", read_as) if len(values) < len(read_as) else ()
        return Column(name, tuple(values)), of_tables, notes
    cells = [numbers.astype(np.float64)[part.places] for (numbers, _), part in zip(found, parts, strict=True)]
    for numbers, file in zip(cells, files, strict=True):
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise TargetError(
                f"the value of {name!r} in row {row} of {str(file.path)!r} is missing or infinite; fill or remove such "
                "rows, or leave the column out"
            )
    return Column(name), cells, ()
