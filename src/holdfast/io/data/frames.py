"""Opens pandas data frames as data sets, in the same way as table files with the same columns."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.data.arrays import Arrays, Choice
from holdfast.io.data.column_matching import refuse_repeated
from holdfast.io.data.columns import SPLIT_COLUMN, ColumnTable, Words, as_numbers, as_words, side_by_side
from holdfast.io.data.expected import Expected
from holdfast.io.data.tables import table_examples

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
    expected: Expected | None = None,
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
        _table(columns, label, expected or Expected()),
        choice or Choice(),
        name=_NAME,
        label=label,
        drop=tuple(drop),
        expected=expected,
    )


def _table(columns: Mapping[str, list[str]], label: str | None, expected: Expected) -> ColumnTable:
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
