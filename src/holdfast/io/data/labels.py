"""Checks of the labels of a data set, which must be one class number for each example."""

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError
from holdfast.core.labels import CLASSIFIERS_ONLY, off_range
from holdfast.core.remedies import Remedy
from holdfast.io.data.expected import Expected

Array = NDArray[Any]

_ROUNDING = 1e-3
"""largest difference from 1 of the sum of the probabilities of the classes; larger than that of float16"""


def whole_numbers(y: Array) -> Array:
    """Return labels that are whole numbers stored as floats as int64, and other labels unchanged."""
    is_whole = y.dtype.kind == "f" and bool((np.isfinite(y) & (y == np.round(y))).all())
    return y.astype(np.int64) if is_whole else y


def refuse_swapped(x: Array, y: Array, name: str, *remedies: Remedy) -> None:
    """Raise `TargetError` if the labels have the shape of inputs, and the inputs are whole numbers or names in the
    shape of labels.
    """
    shaped = y.ndim > x.ndim and len(x) == len(y) and y[:1].size > 1
    if shaped and whole_numbers(x).dtype.kind in "iubU":
        advice = "" if remedies else "; give the inputs first and then the labels, as in (x, y)"
        raise TargetError(
            f"the inputs of {name} have shape {x.shape} and its labels {y.shape}, which seem to be swapped{advice}",
            *remedies,
        )


def class_labels(
    y: Array,
    n_rows: int,
    expected: Expected,
    *,
    classes: int | None,
    name: str,
    source_labels: Array | None = None,
) -> NDArray[np.int64]:
    """Check the labels of a data set, and return them as int64 class numbers (n_rows,) from 0 to classes - 1.

    Raises `TargetError` for other labels, unless `expected` permits any label. If `y` is a part of a source,
    `source_labels` contains the labels of the whole source, whose range is part of the error message.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    all_labels = y if source_labels is None or source_labels.ndim != y.ndim else source_labels
    if y.ndim == 2 and len(y) == n_rows:
        _refuse_rows(all_labels, name)
    if y.ndim != 1:
        raise TargetError(
            f"the labels of {name} have shape {y.shape}; one class number per example was expected. {CLASSIFIERS_ONLY}"
        )
    if len(y) != n_rows:
        raise TargetError(
            f"{name} has {n_rows} examples and {len(y)} labels; one label per example was expected"
        )
    y, all_labels = whole_numbers(y), whole_numbers(all_labels)
    if all_labels.dtype.kind == "f":
        _refuse_fractions(all_labels, name)
    if y.dtype.kind not in "iub":
        raise TargetError(
            f"the labels of {name} are {y.dtype}; integers (int64) were expected: give the index of each name among "
            "the model's classes, as in [names.index(name) for name in y]"
        )
    y = y.astype(np.int64)
    if expected.any_label:
        return y
    if len(y) and y.min() < 0:
        signs = set(np.unique(all_labels).tolist()) == {-1, 1}
        way_out = "give (y + 1) // 2" if signs else "remove rows without a class, or renumber the classes"
        raise TargetError(f"the labels of {name} contain {y.min()}; class numbers start at 0: {way_out}")
    if classes is not None and len(y) and y.max() >= classes:
        lowest, highest = int(all_labels.min()), int(all_labels.max())
        raise off_range(lowest, highest, classes, name, remote=expected.remote)
    return y


def _refuse_fractions(y: Array, name: str) -> NoReturn:
    """Raise `TargetError` for labels that are floats and not all whole numbers."""
    missing = np.flatnonzero(~np.isfinite(y))
    present = y[np.isfinite(y)]
    if len(missing) and bool((present == np.round(present)).all()):
        raise TargetError(
            f"the label of row {missing[0]} of {name} is {y[missing[0]]}; a class number was expected: remove rows "
            "without a class"
        )
    fraction = present[present != np.round(present)][0]
    raise TargetError(
        f"the labels of {name} are {y.dtype} with values such as {fraction:.6g}; class numbers 0, 1, 2, … were "
        f"expected. {CLASSIFIERS_ONLY}"
    )


def _refuse_rows(y: Array, name: str) -> NoReturn:
    """Raise `TargetError` for labels (n, k) with several numbers for each example."""
    start = f"the labels of {name} have shape {y.shape}"
    if y.dtype.kind not in "iubf" or not len(y) or not y.shape[1]:
        raise TargetError(f"{start}; one class number per example was expected. {CLASSIFIERS_ONLY}")
    sums = y.sum(1, dtype=np.float64)
    if not bool(((y == 0) | (y == 1)).all()):
        if y.dtype.kind == "f" and bool((y >= 0).all()) and bool((np.abs(sums - 1) <= _ROUNDING).all()):
            raise TargetError(
                f"{start} and are probabilities of the classes (soft labels); success of an attack is defined by the "
                "true class, so one class number per example was expected"
            )
        raise TargetError(
            f"{start}, several numbers per example; one class number was expected. {CLASSIFIERS_ONLY}"
        )
    several, none = np.flatnonzero(sums > 1), np.flatnonzero(sums == 0)
    if len(several):
        raise TargetError(
            f"{start}, and row {several[0]} has {int(sums[several[0]])} classes; one class per example was expected. "
            "Classifiers with several labels per example are not supported"
        )
    if len(none):
        raise TargetError(
            f"{start}, and {len(none)} of the rows, first row {none[0]}, have no class; one class per example was "
            "expected: remove rows without a class, and then give y.argmax(1)"
        )
    raise TargetError(f"{start} and are one-hot rows; class numbers were expected: give y.argmax(1)")
