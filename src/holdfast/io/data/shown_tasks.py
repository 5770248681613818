"""The task that data show: masks, boxes, or classes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from holdfast.core.errors import HoldfastError, UsageError
from holdfast.core.names import TaskName
from holdfast.io.data.npz import Npz, arrays_of_split, named_arrays
from holdfast.io.data.pictures import holds_samples
from holdfast.io.data_catalogue import GENERATED


def shown_task(
    data: object, *, x: str | None = None, y: str | None = None, split: str | None = None
) -> TaskName | None:
    """Return the task that the labels of data show by their form, or None: masks are of the size of the images, and
    boxes are in a `.json` file, or in one beside each image.

    `x`, `y` and `split` are the names of arrays and the split of an `.npz` file.
    """
    if isinstance(data, str):
        return _of_address(Path(data), x, y, split)
    if isinstance(data, Mapping):
        x, y = x or "x", y or "y"
        data = (data[x], data[y]) if x in data and y in data else None
    if not isinstance(data, tuple | list) or len(data) != 2:
        return None
    inputs, labels = data
    if not all(isinstance(each, np.ndarray | Tensor) for each in (inputs, labels)):
        return None
    return _of_shapes(tuple(inputs.shape), tuple(labels.shape))


def _of_address(path: Path, x: str | None, y: str | None, split: str | None) -> TaskName | None:
    if path.suffix == ".json" and path.is_file():
        return "detection"
    if path.is_dir():
        return "detection" if holds_samples(path) and any(path.glob("*.json")) else None
    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        archive = Npz(path)
        inputs, labels = (
            named_arrays(archive, x, y, split, path.name)
            if x or y
            else arrays_of_split(archive, split, path.name)
        )
        return None if labels is None else _of_shapes(archive.shape(inputs), archive.shape(labels))
    except HoldfastError:  # opening the data raises it again, with advice
        return None


def _of_shapes(inputs: tuple[int, ...], labels: tuple[int, ...]) -> TaskName | None:
    """Return the task of labels of a shape, for inputs of a shape: masks have the size of the images."""
    size = labels[2:] if len(labels) == 4 and labels[1] == 1 else labels[1:]
    if len(size) != 2 or len(inputs) not in (3, 4):
        return None
    return "segmentation" if size in (inputs[1:3], inputs[-2:]) else None


def labels_of_boxes(data: object, *, x: str | None = None, y: str | None = None) -> tuple[int, ...]:
    """Return the labels of the classes in data of detection, as the files name them, or 0 to the highest one in arrays.

    Raises `UsageError` for data without boxes.
    """
    from holdfast.io.data.boxes import open_boxes  # late: few data have boxes
    from holdfast.io.data.scenes import CLASSES

    if isinstance(data, str) and data in GENERATED:
        return tuple(range(len(CLASSES)))
    if isinstance(data, str) and Path(data).suffix != ".npz" and Path(data).exists():
        return open_boxes(Path(data)).ids
    labels = data[1] if isinstance(data, tuple | list) and len(data) == 2 else None
    if isinstance(data, Mapping):
        labels = data.get(y or "y")
    if isinstance(data, str) and Path(data).is_file():
        archive = Npz(Path(data))
        labels = archive.array(named_arrays(archive, x or "x", y or "y", None, data)[1] or "y")
    if not isinstance(labels, np.ndarray | Tensor) or labels.ndim != 3 or labels.shape[2] != 6:
        raise UsageError(
            "the task detection needs boxes; give a COCO file, a folder with a .json file for each image, or arrays "
            "(x, y) with y of shape (n, k, 6): x1, y1, x2, y2, label, crowd, and the label -1 for padding"
        )
    if not len(labels) or not bool((labels[..., 4] >= 0).any()):
        raise UsageError("no image of the data has an object; give images with boxes")
    return tuple(range(int(labels[..., 4].max()) + 1))
