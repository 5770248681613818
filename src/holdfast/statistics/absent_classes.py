"""Classes of a model of which the data have no examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from holdfast.core.types import Labels

_LISTED = 10


def absent_classes(y: Labels, classes: int | None) -> tuple[int, ...]:
    """Return the classes, out of `classes`, that are the label of no example."""
    return tuple(sorted({*range(classes or 0)} - {*torch.unique(y).tolist()}))


def listed_classes(labels: Sequence[int], names: Sequence[str] = ()) -> str:
    """Return the names, or else the numbers, of classes for a message."""
    shown = ", ".join(names[k] if k < len(names) else str(k) for k in labels[:_LISTED])
    return shown + (f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else "")


def classes_of(model: Mapping[str, Any]) -> int | None:
    """Return the number of outputs of the model of an assessment, from its evidence; None if it is unknown."""
    found: int | None = model.get("outputs")
    return found
