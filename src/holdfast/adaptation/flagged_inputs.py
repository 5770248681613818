"""Inputs that the guard of a server flagged and stored, with the classes that a file states for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Labels
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.settings.label_files import read_labels


@dataclass(frozen=True, eq=False)
class Flagged:
    """Flagged inputs."""

    n: int
    """number of all flagged inputs"""
    x: Tensor
    """those with a label (k, *shape)"""
    y: Labels
    """their classes (k,)"""


def read_flagged(
    stored: StoredInputs | None, labels: Path | None, class_names: Sequence[str], *, strict: bool
) -> Flagged:
    """Return the stored inputs of a guard with the labels in a CSV file.

    Raises `UsageError` for an invalid file and, if `strict`, for labels of requests that are not stored. The guard may
    delete inputs while an adaptation runs.
    """
    known = {} if labels is None else read_labels(labels, class_names)
    n, x, y = 0, [], []
    for request in () if stored is None else stored.read():
        n += len(request.rows)
        for place, row in enumerate(request.rows):
            label = known.pop((request.request, row), None)
            if label is not None:
                x.append(request.x[place])
                y.append(label)
    if known and strict:
        request_name, row = next(iter(known))
        raise UsageError(
            f"{labels}: input {row} of the request {request_name!r} is not among the stored flagged inputs; remove "
            "labels of other requests, and those of inputs that were deleted"
        )
    return Flagged(n, torch.stack(x) if x else torch.empty(0), torch.tensor(y, dtype=torch.int64))
