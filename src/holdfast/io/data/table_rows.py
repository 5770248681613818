"""Converts the rows of a table to inputs by its rules: categories become the positions of their values."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.spelling import by_stripped, note_on_spaces
from holdfast.io.data.column_matching import refuse_inexact
from holdfast.io.data.columns import SPLIT_COLUMN, TEXT, ColumnTable, Words
from holdfast.io.files import names_of
from holdfast.threats.tables.checking import checked
from holdfast.threats.tables.rules import Rules, refuse_other_columns


def rows_by_rules(
    table: ColumnTable, rules: Rules, label: str | None, drop: Sequence[str], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Return the inputs (n, columns) in the given rows of a table, in the order of the rules, and notes. Missing values
    are NaN. Categories are compared without spaces at their ends.

    Raises `UsageError` if the columns of the table are not those of the rules, and `TargetError` for cells that the
    rules do not expect.
    """
    present = [name for name in table.columns if name not in (label, SPLIT_COLUMN, *drop)]
    dropped = next((name for name in drop if name in rules.columns), None)
    if dropped is not None:
        raise UsageError(
            f"the column {dropped!r} is dropped, and the rules have it; remove it from the rules, or do not drop it"
        )
    refuse_other_columns(rules, present, table.name)
    x, notes = np.empty((len(rows), len(rules.names)), np.float32), tuple[str, ...]()
    for place, (name, column) in enumerate(rules.columns.items()):
        if column.type == "category":
            words = table.words[name]
            read_as = by_stripped((word for word in words.words if word.strip()), column.values)
            x[:, place] = _codes(words, read_as, column.values, name, rows, table.name)
            notes += note_on_spaces(f"the column {name!r} of {table.name}", read_as)
            continue
        at = table.features.index(name)
        if table.kinds is not None:
            refuse_inexact(table, [name], table.kinds[rows, at : at + 1], rows)
            text = np.flatnonzero(table.kinds[rows, at] == TEXT)
            if len(text):
                raise TargetError(
                    f"row {rows[text[0]]} of {table.name} has text in the column {name!r}, which is a number in "
                    "the rules; set its type to category, and list its values"
                )
        x[:, place] = table.numbers[rows, at]
    return x, notes


def _codes(
    words: Words,
    read_as: Mapping[str, str],
    values: Sequence[str],
    name: str,
    rows: NDArray[np.int64],
    table: str,
) -> NDArray[np.float32]:
    """Return the position in `values` of the name as which the string in each row is read; NaN for empty strings."""
    known = {value: float(place) for place, value in enumerate(values)}
    codes = np.array(
        [known.get(read_as[word], -1.0) if word in read_as else np.nan for word in words.words], np.float32
    )
    result = codes[words.places[rows]]
    unknown = np.flatnonzero(result == -1)
    if len(unknown):
        row = int(rows[unknown[0]])
        word = words.words[words.places[row]]
        raise TargetError(
            f"row {row} of {table} has {word!r} in the column {name!r}, whose values in the rules are "
            f"{names_of(values)}; add it to them if the model was trained with it, or leave such rows out"
        )
    return result


def notes_of_rules(
    rules: Rules, x: NDArray[np.float32], ids: NDArray[np.int64], name: str
) -> tuple[str, ...]:
    """Compare the inputs (n, columns) with the rules, and return notes for the report.

    Raises `TargetError` for inputs with another number of columns, and for missing values that the rules forbid.
    """
    if x.ndim != 2 or x.shape[1] != len(rules.names):
        raise TargetError(
            f"the inputs of {name} have shape {x.shape}, and the rules have {len(rules.names)} columns; rows with "
            "a value for each of them were expected, in their order"
        )
    for place, (column_name, column) in enumerate(rules.columns.items()):
        missing = np.flatnonzero(np.isnan(x[:, place]))
        if len(missing) and not column.missing:
            raise TargetError(
                f"the value of {column_name} in row {ids[missing[0]]} of {name} is missing, which the rules "
                "forbid; set missing: true if the model accepts such rows, or leave them out"
            )
    return checked(rules, x.astype(np.float64)).notes(len(x))
