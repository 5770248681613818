"""Data sets from tables and data frames: numeric columns are the features, and one column is the label."""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.core.batch import CLASSIFIERS_ONLY, UNLABELLED
from holdfast.core.errors import NoSplit, Placeholder, TargetError, UsageError, data_argument
from holdfast.core.names import most_similar
from holdfast.core.types import Layout
from holdfast.io.data.arrays import Arrays, Choice, first_rows_note, from_numpy, handles_missing
from holdfast.io.data.columns import (
    MISSING,
    NUMBER,
    SPLIT_COLUMN,
    TEXT,
    ColumnInputs,
    ColumnTable,
    Words,
    as_numbers,
    as_words,
    left_out,
    matched_columns,
    number_of,
    refuse_inexact,
    refuse_repeated,
    rows_by_rules,
    side_by_side,
    without,
)
from holdfast.io.data.labels import Groups, numbered, numbered_words, refuse_unknown
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.pictures import decoded
from holdfast.io.files import names_of, readable_file, similar_name
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.sandbox_main import Limits
from holdfast.io.sandbox.tables import TableRequest, table

_MOST = 0.5
"""Share of numbers above which strings in a column probably stand for missing values."""
SUFFIXES = (".csv", ".csv.gz", ".parquet")
LIMITS = Limits(copies=4, spare_bytes=2**32)
"""Limits of the process that reads the file."""


def open_table(
    path: Path,
    choice: Choice,
    *,
    name: str,
    label: str | None,
    drop: tuple[str, ...] = (),
    expected: DeclaredData | None = None,
    inputs: str | None = None,
    separator: str | None = None,
    header: bool = True,
) -> Arrays:
    """Return the rows of one split of a table file as a data set with float32 features.

    Labels that are integers from 0 on are the class numbers. Other labels are class names. `name` is the name of the
    table in messages, `label` the label column, and `drop` lists columns that are not features. If a parquet file has a
    column of images or of arrays, its cells are the inputs; `inputs` names it if there are several. `separator` and
    `header` are those of a CSV file. The columns of a file without a header get the names of the columns that the model
    was fitted on, in their order, if their number is equal.
    """
    expected = expected or DeclaredData()
    column_table = read_table(
        path,
        label=label,
        drop=drop,
        expected=expected,
        inputs=None if expected.edits is not None else inputs,
        separator=separator,
        header=header,
    )
    return table_examples(column_table, choice, name=name, label=label, drop=drop, expected=expected)


def read_table(
    path: Path,
    *,
    label: str | None,
    drop: tuple[str, ...] = (),
    expected: DeclaredData,
    inputs: str | None = None,
    separator: str | None = None,
    header: bool = True,
) -> ColumnTable:
    """Return the columns of a table file, of which those that `expected` names are read as strings."""
    readable_file(path, "data file")
    request = TableRequest(
        label,
        drop,
        inputs,
        separator or ",",
        header,
        expected.words,
        expected.groups,
        needs_label=expected.needs_labels,
    )
    with read_under_limits("tables", path, LIMITS, **vars(request)) as (description, folder):
        refuse_repeated(description["columns"], repr(str(path)), expected.first)
        return replace(table(path, description, folder), has_header=header)


def table_examples(
    table: ColumnTable,
    choice: Choice,
    *,
    name: str,
    label: str | None,
    drop: tuple[str, ...] = (),
    expected: DeclaredData | None = None,
) -> Arrays:
    """Return the rows of one split of a table in memory as a data set, with the same rules as `open_table`."""
    expected = expected or DeclaredData()
    label, label_notes = _label_if_needed(label, table, expected)
    if expected.first is not None:  # which has the columns that are dropped, and others may lack them
        drop = tuple(name for name in drop if name in table.columns)
    _refuse_dropped(drop, label, table)
    groups = _groups(table, expected)
    drop = (*drop, *_groups_only(table, expected))
    rows_of_split = _rows_of_split(table, choice.split)
    chosen = rows_of_split[choice.rows(len(rows_of_split), name)]
    column = None if label is None else table.words[label]
    if column is None:
        y: NDArray[Any] | None = np.full(len(table), UNLABELLED)
        expected = replace(expected, checks_labels=False)
    else:
        y = _numbers_of(column, expected, label or "", name)
    features: tuple[str, ...] | None = None
    named = True
    notes: tuple[str, ...] = ()
    layout: Layout | None = None
    x: NDArray[Any]
    if expected.edits is not None:
        from holdfast.io.data.columns import column_of_texts  # late: few inputs are texts

        x, notes = column_of_texts(table, expected.words[0] if expected.words else None, label, drop, chosen)
    elif expected.rules is not None:
        features = expected.rules.names
        used = (label, SPLIT_COLUMN, *drop, *features)
        # unused columns of the first table are refused
        further = () if expected.first is None else tuple(name for name in table.columns if name not in used)
        x, notes = rows_by_rules(table, expected.rules, label, (*drop, *further), chosen)
        notes = (*left_out(table.name, further), *notes)
    elif table.inputs is not None:
        x, layout, notes = _whole_inputs(table.inputs, chosen, name)
    else:
        present = [name for name in table.features if name not in drop]
        table, features, named, notes = matched_columns(table, present, expected)
        x = _numbers(table, features, chosen, expected)
    if column is not None and expected.task is None:
        notes += first_rows_note(column.places[rows_of_split], column.places[chosen], choice.n)
    of_source: dict[str, Any] = {"layout": layout, "notes": (*label_notes, *notes), "features": features}
    groups = None if groups is None else groups.taken(chosen)
    if y is not None:
        data = from_numpy(name, x, y[chosen], chosen, expected, source_labels=y, **of_source)
        return replace(data, groups=groups, named=named)
    assert column is not None
    # names are numbered after the model was called with the inputs, which determines its number of classes
    data = from_numpy(name, x, np.zeros(len(chosen), np.int64), chosen, expected, **of_source)
    numbering = numbered_words(column.words, column.places, expected, table.name)
    data = replace(data, y=numbering.y[chosen], classes=numbering.names, groups=groups, named=named)
    return data.labelled(numbering)


def _groups(table: ColumnTable, expected: DeclaredData) -> Groups | None:
    """Return the group of each row, or None if no groups are requested. Raises `UsageError` if the column does not
    exist.
    """
    column = expected.groups
    if column is None or not expected.needs_groups:
        return None
    refuse_unknown(column, table.columns, table.name, expected.group_setting)
    return Groups.of_words(table.words[column], column)


def _groups_only(table: ColumnTable, expected: DeclaredData) -> tuple[str, ...]:
    """Return the column of the groups if it is no feature: one that the model was not fitted on or, if its columns are
    unknown, one with text.
    """
    column, fitted = expected.groups, expected.feature_names
    if column is None or column not in table.features:
        return ()
    kinds = None if table.kinds is None else table.kinds[:, table.features.index(column)]
    has_text = kinds is not None and bool((kinds == TEXT).any())
    is_feature = column in fitted if fitted is not None and table.has_header else not has_text
    return () if is_feature else (column,)


def _whole_inputs(
    inputs: ColumnInputs, rows: NDArray[np.int64], name: str
) -> tuple[NDArray[Any], Layout | None, tuple[str, ...]]:
    """Return the inputs in the given rows of a column of images or of arrays, their layout, and notes for the report.

    The layout of arrays is unknown.
    """
    notes: tuple[str, ...] = ()
    if inputs.unread:
        shown = f"{', '.join(inputs.unread[:6])}{' …' if len(inputs.unread) > 6 else ''}"
        notes = (f"the inputs are the column {inputs.column}; other columns were not read: {shown}",)
    if isinstance(inputs.cells, np.ndarray):
        return inputs.cells[rows], None, notes
    x, image_notes = decoded([inputs.cells[row] for row in rows], rows.tolist(), name)
    return x, "chw", (*notes, *image_notes)


def _label_if_needed(
    label: str | None, table: ColumnTable, expected: DeclaredData
) -> tuple[str | None, tuple[str, ...]]:
    """Return the name of the label column, or None with a note if labels are optional and the table has none.

    Only the first table must have a column that was stated.
    """
    if expected.needs_labels or label in table.columns or (label is not None and expected.first is None):
        return label_column(label, table), ()
    return None, () if label is None else (
        f"{table.name} has no column {label!r}, so its labels are unknown",
    )


def label_column(label: str | None, table: ColumnTable) -> str:
    """Return the name of the label column of a table. Raises `UsageError` if it does not exist."""
    if label is not None and label in table.columns:
        return label
    wrong = (
        f"{table.name} has no column {label!r}"
        if label
        else f"the label column of {table.name} is not stated"
    )
    similar = most_similar(label, table.columns) if label else None
    raise UsageError(
        f"{wrong}; its columns are {names_of(table.columns)}",
        data_argument("label", similar or Placeholder("COLUMN")),
    )


def _refuse_dropped(drop: tuple[str, ...], label: str | None, table: ColumnTable) -> None:
    for column in drop:
        if column not in table.columns:
            several = column.split(",")
            if len(several) > 1 and all(part.strip() in table.columns for part in several):
                raise UsageError(
                    f"{table.name} has no column {column!r}; columns are listed one by one",
                    *without([part.strip() for part in several]),
                )
            raise UsageError(
                f"{table.name} has no column {column!r} to drop{similar_name(column, table.columns)}"
            )
        if column == label:
            raise UsageError(
                f"{column!r} is the label of {table.name}, and is dropped", data_argument("drop")
            )


def _rows_of_split(table: ColumnTable, split: str | None) -> NDArray[np.int64]:
    column = table.words.get(SPLIT_COLUMN)
    if column is None:
        if split is not None:
            raise NoSplit(
                f"{table.name} has no column {SPLIT_COLUMN!r}, and the split {split!r} is chosen",
                data_argument("split"),
            )
        return np.arange(len(table), dtype=np.int64)
    name = split or "test"
    if name not in column.words:
        splits = sorted(column.words)
        raise NoSplit(
            f"{table.name} has no split {name!r}{similar_name(name, splits)}; it has {names_of(splits)}"
        )
    return np.flatnonzero(column.places == column.words.index(name)).astype(np.int64)


def _class_numbers(column: Words, name: str) -> NDArray[np.int64] | None:
    """Return labels that are integers from 0 on, which are the class numbers, or None for labels that are names."""

    def first(places: list[int]) -> int:
        """Return the number of the first row whose label is one of the given strings."""
        chosen = np.zeros(len(column.words), bool)
        chosen[places] = True
        return int(chosen[column.places].argmax())

    empty = [place for place, word in enumerate(column.words) if not word.strip()]
    if empty:
        raise TargetError(f"the label of row {first(empty)} of {name} is missing; drop such rows")
    integers = [_whole(word) for word in column.words]
    numbers = [number for number in integers if number is not None]
    if len(numbers) == len(integers) and all(number >= 0 for number in numbers):
        return np.array(numbers, dtype=np.int64)[column.places]
    if None in integers and all(number_of(word) is not None for word in column.words):
        row = first([place for place, number in enumerate(integers) if number is None])
        raise TargetError(
            f"the label of row {row} of {name} is {column.words[column.places[row]]}; whole numbers from 0 on, or "
            f"names, were expected. {CLASSIFIERS_ONLY}"
        )
    return None


def _numbers_of(column: Words, expected: DeclaredData, label: str, name: str) -> NDArray[Any] | None:
    """The targets or the class numbers of all rows, or None if the labels are names."""
    if expected.task is not None:
        return _targets(column, label, name)
    y = _class_numbers(column, name)
    return None if y is None else numbered(y, expected, name).y


def _targets(column: Words, label: str, name: str) -> NDArray[np.float64]:
    """The numbers in the label column of a table. Raises `TargetError` for a cell that is no number."""
    numbers = [number_of(word) for word in column.words]
    if None in numbers:
        place = numbers.index(None)
        row = int((column.places == place).argmax())
        raise TargetError(
            f"{label!r} in row {row} of {name} is {column.words[place]!r}; the targets of a regression are numbers"
        )
    return np.array(numbers, np.float64)[column.places]


def _whole(text: str) -> int | None:
    number = number_of(text)
    # Larger numbers do not fit into int64.
    return int(number) if number is not None and number.is_integer() and abs(number) < 2**63 else None


def _numbers(
    table: ColumnTable, features: Sequence[str], rows: NDArray[np.int64], expected: DeclaredData
) -> NDArray[np.float32]:
    if not features:
        raise TargetError(f"{table.name} has no column beside its label; at least one feature was expected")
    numbers = {name: place for place, name in enumerate(table.features)}
    places = [numbers[name] for name in features]
    kinds = np.empty(0, np.uint8) if table.kinds is None else table.kinds[rows][:, places]
    if kinds.any():  # the groups may have text or missing values, and be no feature
        text = [name for name, column in zip(features, kinds.T, strict=True) if (column == TEXT).any()]
        x = table.numbers[rows][:, places]
        refuse_inexact(table, features, kinds, rows)
        if text or not handles_missing(x, expected):
            _refuse_missing(table, features, kinds, rows)
        if text:
            mostly = (kinds == NUMBER).mean(0) > _MOST
            sparse = [
                name for name, numeric in zip(features, mostly, strict=True) if numeric and name in text
            ]
            raise _not_numbers(table, features, text, sparse, expected=expected)
    return table.numbers[rows][:, places]


def _refuse_missing(
    table: ColumnTable, features: Sequence[str], kinds: NDArray[np.uint8], rows: NDArray[np.int64]
) -> None:
    """Raise `TargetError` for a numeric column with an empty cell."""
    for name, column in zip(features, kinds.T, strict=True):
        missing = np.flatnonzero(column == MISSING)
        if len(missing) and not (column == TEXT).any():
            raise TargetError(
                f"the value of {name} in row {rows[missing[0]]} of {table.name} is missing; fill or drop such rows, or "
                f"leave the column out with --drop {shlex.quote(name)}"
            )


def _not_numbers(
    table: ColumnTable,
    features: Sequence[str],
    text: Sequence[str],
    sparse: Sequence[str],
    *,
    expected: DeclaredData,
) -> TargetError:
    """Return the error for the columns `text`, which contain strings. `sparse` are those of them whose cells are mostly
    numbers, so that the strings probably stand for missing values.
    """
    counted = "1 column" if len(text) == 1 else f"{len(text)} columns"
    shown, more = text[:6], " …" if len(text) > 6 else ""
    empty = (
        f". Most cells of {sparse[0]} are numbers: leave a cell empty for a missing value" if sparse else ""
    )
    words = [name for name in text if name not in sparse]
    fitted = {*words} & {*(expected.feature_names or ())}
    rules = (
        ", as the model was trained, or give a threat such as table:rules.yaml, with the rules of the table, or "
        "text:edits=1,words=3, for a model of texts"
    )
    return TargetError(
        f"{counted} of {table.name} {'is' if len(text) == 1 else 'are'} not numbers: {', '.join(shown)}{more}. Write "
        f"numbers in place of the text{rules if expected.has_threat else ''}{empty}",
        *(without(words) if 0 < len(words) < len(features) and not fitted else ()),
    )


_NAME = "the data frame"


def is_frame(data: object) -> bool:
    """Return whether the object is a pandas data frame, or a pair of a frame and its labels.

    The function does not import pandas.
    """
    # If pandas was not imported, the object cannot be a data frame; importing it here would be slow.
    pandas = sys.modules.get("pandas")
    inputs = data[0] if isinstance(data, tuple) and len(data) == 2 else data
    return pandas is not None and isinstance(inputs, pandas.DataFrame)


def open_frame(
    data: Any,
    *,
    label: str | None = None,
    drop: Iterable[str] = (),
    choice: Choice | None = None,
    expected: DeclaredData | None = None,
) -> Arrays:
    """Return the examples of a pandas data frame as a data set with float32 features. The labels are a column of the
    frame, or the second element of a pair.

    Raises the same `UsageError` and `TargetError` as `open_table`. The order of the rows is preserved. Labels with the
    same index in another order are rejected, because they could be matched by index or by position.
    """
    frame, labels = data if isinstance(data, tuple) else (data, None)
    names = [str(name) for name in frame.columns]
    refuse_repeated(names, _NAME, None if expected is None else expected.first)
    columns = {name: text_of(frame.iloc[:, place]) for place, name in enumerate(names)}
    if labels is not None:
        if label is not None:
            raise UsageError(
                f"label={label!r} is a column, but labels were given separately as well; omit one of them"
            )
        label, columns = _with_labels(columns, labels, frame.index)
    return table_examples(
        _table(columns, label, expected or DeclaredData()),
        choice or Choice(),
        name=_NAME,
        label=label,
        drop=tuple(drop),
        expected=expected,
    )


def _table(columns: Mapping[str, list[str]], label: str | None, expected: DeclaredData) -> ColumnTable:
    only_texts = (label, SPLIT_COLUMN, *(columns if expected.words is None else expected.words))
    texts = [name for name in columns if name in (*only_texts, expected.groups)]
    features = [name for name in columns if name not in only_texts]
    rows = len(next(iter(columns.values()), []))
    numbers, kinds = side_by_side([as_numbers(columns[name]) for name in features], rows)
    words = {}
    for name in texts:
        indices: dict[str, int] = {}
        places = as_words(columns[name], indices)
        words[name] = Words(tuple(indices), places)
    return ColumnTable(_NAME, tuple(columns), tuple(features), numbers, kinds if kinds.any() else None, words)


def _with_labels(columns: dict[str, list[str]], labels: Any, index: Any) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the new label column, and the columns including it."""
    values = labels if hasattr(labels, "isna") else np.asarray(labels)
    _refuse_other_order(index, values)
    if getattr(values, "ndim", 1) == 2 and values.shape[1] == 1:
        values = values.iloc[:, 0] if hasattr(values, "iloc") else values[:, 0]
    if values.ndim != 1 or len(values) != len(index):
        raise TargetError(
            f"{_NAME} has {len(index)} rows and the labels have shape {tuple(values.shape)}; one "
            "label per row was expected"
        )
    name = "label"
    while name in columns:
        name += "_"
    return name, {**columns, name: text_of(values)}


def _refuse_other_order(index: Any, labels: Any) -> None:
    label_index = getattr(labels, "index", None)
    if (
        label_index is None
        or callable(label_index)
        or len(label_index) != len(index)
        or label_index.equals(index)
    ):
        return
    if label_index.sort_values().equals(index.sort_values()):
        raise TargetError(
            f"{_NAME} and its labels have the same index in another order; give labels.loc[frame.index] to pair them "
            "by index, or labels.to_numpy() to pair them by position"
        )


def text_of(column: Any) -> list[str]:
    """Return the values of a column as strings. A missing value becomes the empty string, as in a file."""
    missing = np.asarray(column.isna()) if hasattr(column, "isna") else np.zeros(len(column), bool)
    return [
        "" if is_missing else str(value)
        for is_missing, value in zip(missing, np.asarray(column), strict=True)
    ]
