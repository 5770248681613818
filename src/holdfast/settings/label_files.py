"""CSV files with the classes of requests to a server."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from holdfast.core.errors import UsageError
from holdfast.core.spelling import by_stripped
from holdfast.io.files import text_of_file

_DIGITS = 18
"""Largest number of digits of a whole number, which then has 64 bits."""
_MOST_BYTES = 2**27
"""Largest size of the file: two million labels, each with the id of a request."""


def read_labels(path: Path, class_names: Sequence[str]) -> dict[tuple[str, int], int]:
    """Return the class of each input, by the request and the position of the input in it.

    The columns are `request`, `label` (a number, or the name of a class) and `row`, which is 0 if it is absent. Raises
    `UsageError` for an invalid file, and `TargetError` for one that cannot be read.
    """
    try:
        reader = csv.DictReader(
            io.StringIO(text_of_file(path, "file of labels", most=_MOST_BYTES), newline=""),
            restval="",
        )
        columns = set(reader.fieldnames or ())
        rows = list(reader)
    except csv.Error as error:
        raise UsageError(f"the labels {str(path)!r} cannot be read: {error}; give a CSV file") from error
    if not {"request", "label"} <= columns:
        raise UsageError(
            f"{path}: the columns are {', '.join(sorted(columns)) or 'none'}; request and label were expected, and row "
            "for requests of several inputs"
        )
    known = {}
    for line, row in enumerate(rows, 2):
        key = row["request"], _number(row.get("row") or "0", f"{path}: row in line {line}")
        if key in known:
            raise UsageError(f"{path}: line {line} repeats a label of the request {key[0]!r}; give each once")
        known[key] = _label(row["label"], class_names, f"{path}: label in line {line}")
    return known


def _label(text: str, class_names: Sequence[str], where: str) -> int:
    name = by_stripped([text], class_names)[text]
    if name in class_names:
        return class_names.index(name)
    return _number(text, where)


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise UsageError(f"{where} is {text!r}; a whole number of at most {_DIGITS} digits was expected")
    return int(text)
