"""Converts texts of a data set to rows of code points, with room for the changes that the threat model allows."""

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Placeholder, data_argument
from holdfast.core.texts import encoded
from holdfast.io.data.columns import SPLIT_COLUMN, ColumnTable, number_of
from holdfast.io.files import names_of
from holdfast.threats.text_edits import TextEdits

MOST_VALUES = 1 << 28
"""Largest number of code points of a data set with padding: 1 GiB of memory."""


def codes(
    texts: NDArray[np.str_], edits: TextEdits, ids: NDArray[np.int64], name: str
) -> NDArray[np.float32]:
    """Return the code points of texts (n, width), each padded with zeros to the length of the longest text that the
    constraint allows. `ids` are the row numbers of the texts in the source.

    Raises `TargetError` for empty texts, and for texts with characters that cannot be stored.
    """
    if texts.dtype.kind != "U" or texts.ndim != 1:
        raise TargetError(
            f"the inputs of {name} are {texts.dtype} of shape {texts.shape}, and the threat {edits} changes texts; a "
            "list of strings, or one column of texts, was expected"
        )
    rows: list[str] = texts.tolist()
    for text, row in zip(rows, ids.tolist(), strict=True):
        if not text.strip():
            raise TargetError(f"the text in row {row} of {name} is empty; remove such rows")
        if "\0" in text or any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise TargetError(
                f"the text in row {row} of {name} contains the character 0 or a surrogate; remove it from the texts"
            )
    words, growth = edits.room
    width = max(map(len, rows)) + words * max(0, growth)
    if width * len(rows) > MOST_VALUES:
        raise TargetError(
            f"the {len(rows):,} texts of {name} need {width:,} characters each, because the longest has "
            f"{max(map(len, rows)):,}; at most {MOST_VALUES:,} together were expected: shorten the longest texts, or "
            f"take fewer"
        )
    array: NDArray[np.float32] = encoded(rows, width).numpy()
    return array


def column_of_texts(
    table: ColumnTable,
    requested: str | None,
    label: str | None,
    drop: tuple[str, ...],
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.str_], tuple[str, ...]]:
    """Return the texts in the given rows of a table, and a note for the report if other columns are not used.

    Without a `requested` column, it is the only column beside the label that contains no numbers. Raises `UsageError`
    if there is no such column, or if there are several.
    """
    if requested is not None and requested == label:
        raise UsageError(
            f"{label!r} is the label of {table.name}, and the inputs",
            data_argument("x", Placeholder("COLUMN")),
        )
    others = [name for name in table.columns if name not in (label, SPLIT_COLUMN, *drop)]
    found = [requested] if requested else [name for name in others if _is_text(table, name)]
    if len(found) != 1 or found[0] not in table.words:
        problem = f"the columns of texts {names_of(found)}" if len(found) > 1 else "no such column of texts"
        raise UsageError(
            f"{table.name} has {problem}; its columns beside the label are {names_of(others)}",
            data_argument("x", Placeholder("COLUMN")),
        )
    column = table.words[found[0]]
    unread = [name for name in others if name != found[0]]
    note = f"the texts are the column {found[0]}; other columns were not used: {names_of(unread)}"
    texts = np.array([column.words[place] for place in column.places[rows].tolist()], np.str_)
    return texts, (note,) if unread else ()


def _is_text(table: ColumnTable, name: str) -> bool:
    """Return whether most of the distinct cells of a column are not numbers."""
    words = table.words[name].words if name in table.words else ()
    return sum(number_of(word) is None for word in words) > len(words) / 2
