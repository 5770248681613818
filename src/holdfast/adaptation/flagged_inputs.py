"""Inputs that the guard of a server flagged and stored, with the classes that a file states for them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Labels
from holdfast.guard.stored_inputs import StoredInputs


@dataclass(frozen=True, eq=False)
class Flagged:
    """Flagged inputs."""

    n: int
    """number of all flagged inputs"""
    x: Tensor
    """those with a label (k, *shape)"""
    y: Labels
    """their classes (k,)"""


def read_flagged(stored: StoredInputs | None, labels: Path | None, class_names: Sequence[str]) -> Flagged:
    """Return the stored inputs of a guard with the labels in a CSV file.

    Raises `UsageError` for labels of requests that are not stored, and for an invalid file.
    """
    known = {} if labels is None else _labels(labels, class_names)
    n, x, y = 0, [], []
    for request in () if stored is None else stored.read():
        n += len(request.rows)
        for place, row in enumerate(request.rows):
            label = known.pop((request.request, row), None)
            if label is not None:
                x.append(request.x[place])
                y.append(label)
    if known:
        request_name, row = next(iter(known))
        raise UsageError(
            f"{labels}: input {row} of the request {request_name!r} is not among the stored flagged inputs; remove "
            "labels of other requests, and those of inputs that were deleted"
        )
    return Flagged(n, torch.stack(x) if x else torch.empty(0), torch.tensor(y, dtype=torch.int64))


def _labels(path: Path, class_names: Sequence[str]) -> dict[tuple[str, int], int]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
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
    if text in class_names:
        return class_names.index(text)
    return _number(text, where)


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{where} is {text!r}; a whole number was expected")
    return int(text)
