"""The truth of a task in arrays of data."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from holdfast.core.errors import TargetError
from holdfast.core.names import TaskName
from holdfast.tasks.segmentation import IGNORED

Array = NDArray[Any]

_IGNORED_BYTE: Final = 255
"""class of pixels that do not count in masks of bytes, as in PASCAL VOC and Cityscapes"""
_FORMS: Final[dict[TaskName, str]] = {
    "segmentation": "a mask of classes for each image, (N, height, width)",
    "detection": "boxes, (N, k, 6): x1, y1, x2, y2, label, crowd; give a COCO file or a folder with one .json an image",
    "regression": "one number for each example, (N,), or several, (N, k)",
    "multilabel": "0 or 1 for each label, (N, labels)",
}


def truth_of(task: TaskName, y: Array, n_rows: int, name: str) -> Array:
    """Return the truth (n_rows, *truth) of a task: targets as float32 (n, k), masks and labels as int64, boxes as
    float32.

    Pixels of masks that do not count become -1. Raises `TargetError` for other shapes, and for values that are no
    numbers, no classes, or neither 0 nor 1.
    """
    if task == "regression" and y.ndim == 1:
        y = y[:, None]
    if task == "segmentation" and y.ndim == 4 and y.shape[1] == 1:
        y = y[:, 0]
    axes = {"segmentation": 3, "detection": 3, "regression": 2, "multilabel": 2}[task]
    if y.ndim != axes or y.dtype.kind not in "iubf":
        kind = "text" if y.dtype.kind in "USTO" else str(y.dtype)
        raise TargetError(
            f"the labels of {name} are {kind} of shape {y.shape}, and the task {task} needs {_FORMS[task]}"
        )
    if len(y) != n_rows:
        raise TargetError(
            f"{name} has {n_rows} examples and {len(y)} labels; one for each example was expected"
        )
    finite = np.isfinite(y).reshape(len(y), -1).all(1)
    if not finite.all():
        raise TargetError(
            f"the labels of {name} contain NaN or infinity, first in row {int(np.flatnonzero(~finite)[0])}; remove "
            "such rows"
        )
    if task in ("regression", "detection"):
        return y.astype(np.float32)
    whole = y.astype(np.int64)
    if (whole != y).any():
        raise TargetError(
            f"the labels of {name} contain {y[whole != y][0]:g}; the task {task} needs {_FORMS[task]}"
        )
    if task == "segmentation":
        whole[whole == _IGNORED_BYTE] = IGNORED
        lowest, highest = IGNORED, None
        if whole.size and (whole == IGNORED).all():
            raise TargetError(
                f"no pixel of the masks of {name} counts: all are 255 or -1; give masks with classes from 0"
            )
    else:
        lowest, highest = 0, 1
    wrong = whole < lowest if highest is None else (whole < lowest) | (whole > highest)
    if wrong.any():
        raise TargetError(
            f"the labels of {name} contain {int(whole[wrong][0])}; the task {task} needs {_FORMS[task]}"
            + (
                ""
                if highest is not None
                else ", with classes from 0, and 255 or -1 for pixels that do not count"
            )
        )
    return whole
