"""Matches the columns of a table with those of the first table of a run and with those that the model was fitted on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.io.data.columns import EXACT, INEXACT, ColumnTable
from holdfast.io.data.expected import Expected, FirstTable
from holdfast.io.files import names_of

_LISTED = 20
"""Largest number of columns that a remedy lists."""
_SHOWN = 6
"""Number of columns in a note."""


def matched_columns(
    table: ColumnTable, features: Sequence[str], expected: Expected
) -> tuple[ColumnTable, tuple[str, ...], bool, tuple[str, ...]]:
    """Return a table, the names of its features in the order of the model's inputs, whether they are names and not
    positions, and notes for the report.

    The names are matched with those of the first table of the run if it has names, and else with those that the model
    was fitted on. Without names on one side, columns are taken in their order. Raises `TargetError` for a column that
    is missing, and in the first table also for others.
    """
    first, wanted = expected.first, expected.column_names
    if wanted is None:
        notes = _in_order(table.name, features, first)
        return table, tuple(features), table.has_header, notes
    if not table.has_header:
        _refuse_other_number(table.name, features, wanted, expected.column_source, fitted=first is None)
        named = dict(zip(features, wanted, strict=True))
        listed = _few([f"{position}={name}" for position, name in named.items()])
        source = "those of " + first.name if first is not None and first.named else "the model's"
        note = f"the file has no header; its columns were taken in the order of {source}: {listed}"
        table = replace(table, features=tuple(named.get(name, name) for name in table.features))
        return table, wanted, True, (note,)
    further = [name for name in features if name not in wanted]
    missing = [name for name in wanted if name not in features]
    if missing and first is not None:
        columns = "column" if len(missing) == 1 else "columns"
        raise TargetError(
            f"{table.name} lacks the {columns} {names_of(missing)}. Its columns are {names_of(features)}, and "
            f"{expected.column_source} {names_of(wanted)}; give the same columns, in any order"
        )
    if missing or (further and first is None):
        lacks = f"lacks {_few(list(map(repr, missing)))}" if missing else ""
        has = f"has {_few(list(map(repr, further)))} beside them" if further else ""
        raise TargetError(
            f"{expected.column_source} {len(wanted)} named columns, and {table.name} "
            f"{' and '.join(filter(None, (lacks, has)))}; give the columns as in training",
            *(() if missing else without(further)),
        )
    return table, wanted, True, left_out(table.name, further)


def left_out(name: str, further: Sequence[str]) -> tuple[str, ...]:
    """Return the note on columns of a table that the first one does not have."""
    return (f"{name} has further columns, which were left out: {_few(further)}",) if further else ()


def in_order_of_first(name: str, expected: Expected, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the note on an array beside a table, whose inputs have this `shape` and no names of columns. Raises
    `TargetError` if the numbers of columns differ.
    """
    if expected.first is None or expected.first.columns is None or len(shape) != 1:
        return ()
    return _in_order(name, list(map(str, range(shape[0]))), expected.first)


def _in_order(name: str, columns: Sequence[str], first: FirstTable | None) -> tuple[str, ...]:
    """Return the note on columns that were not matched by names. Raises `TargetError` for another number of them."""
    if first is None:
        return ()
    if first.columns is not None:
        _refuse_other_number(name, columns, first.columns, first.has, fitted=False)
    nameless = name if first.named else first.name
    note = (
        f"the columns of {name} are taken in the order of those of {first.name}, because {nameless} has no names of "
        f"columns: {_few(first.columns if first.named and first.columns else columns)}"
    )
    return (note,)


def refuse_repeated(columns: Sequence[str], name: str, first: FirstTable | None = None) -> None:
    """Raise `TargetError` for names of columns that are not distinct. `first` is the table whose columns they are
    matched with.
    """
    repeated = [column for column, n in Counter(columns).items() if n > 1]
    if repeated:
        others = f", and {first.has} {names_of(first.columns)}" if first and first.columns else ""
        raise TargetError(
            f"{name} has several columns named {repeated[0]!r}. Its columns are {names_of(columns)}{others}; give each "
            "column a name of its own"
        )


def without(columns: Sequence[str]) -> tuple[Remedy, ...]:
    """Return the argument with which columns are no features; none if they are too many to be listed."""
    drop = Remedy("drop", tuple(columns), function="open_data", repeated=True)
    return (drop,) if len(columns) <= _LISTED else ()


def _refuse_other_number(
    name: str, features: Sequence[str], wanted: Sequence[str], source: str, *, fitted: bool
) -> None:
    """Raise `TargetError` if a table without names has another number of columns than the `wanted` ones."""
    if len(features) != len(wanted):
        drop = Remedy("drop", Placeholder("COLUMN", "[COLUMN]"), function="open_data")
        raise TargetError(
            f"{source} {len(wanted)} columns ({names_of(wanted)}), and {name} without names has {len(features)} "
            f"beside its label ({names_of(features)}); give as many, in the same order",
            *((drop,) if fitted and len(features) > len(wanted) else ()),
        )


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"


def refuse_inexact(
    table: ColumnTable, features: Sequence[str], kinds: NDArray[np.uint8], rows: NDArray[np.int64]
) -> None:
    """Raise `TargetError` for a number that loses information as float32, in which rows are stored."""
    for name, column in zip(features, kinds.T, strict=True):
        inexact = np.flatnonzero(column == INEXACT)
        if len(inexact):
            raise TargetError(
                f"the column {name!r} of {table.name} has numbers above {EXACT:,}, first in row "
                f"{rows[inexact[0]]}, and float32, in which rows are stored, represents all whole numbers only up to "
                "it: scale the column as in training, or leave it out if it is an id",
                *(without([name]) if len(features) > 1 else ()),
            )
