"""Makes data sets from Python objects: tensors, arrays, torch loaders and torch datasets."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from holdfast.core.batch import Data
from holdfast.core.errors import TargetError, UsageError
from holdfast.sources.arrays import Array, from_numpy
from holdfast.sources.class_numbers import numbered
from holdfast.sources.expected import Expected
from holdfast.sources.labels import whole_numbers

_BATCH = 256
"""Number of items of a dataset that are read at a time."""


def as_data(
    x: object,
    y: object = None,
    *,
    name: str = "data in memory",
    expected: Expected | None = None,
    n: int | None = None,
) -> Data:
    """Return a data set made from inputs `x` and labels `y`, or from a loader or dataset of pairs. A `Data` object is
    returned unchanged.

    The layout of tensors is preserved, whatever their type, as are the types float32 and float64. numpy arrays are
    interpreted as in an `.npz` file. String labels are class names. A loader is read once, into memory, and only up to
    its first `n` examples if `n` is given. `expected` declares properties of the data.
    """
    expected = expected or Expected()
    if y is None:
        if isinstance(x, Data):
            return _user_defined(x, expected)
        if isinstance(x, tuple) and len(x) == 2:
            x, y = x
        else:
            x, y = _collected(x, n)
    inputs = as_array(x, "inputs")
    numbering = numbered(whole_numbers(as_array(y, "labels")), expected, name)
    ids = np.arange(len(inputs), dtype=np.int64)
    resolution = torch.finfo(x.dtype).eps if isinstance(x, Tensor) and x.is_floating_point() else None
    data = from_numpy(
        name,
        inputs,
        numbering.y,
        ids,
        expected,
        class_names=numbering.names,
        preserve=isinstance(x, Tensor),
        resolution=resolution,
    )
    return replace(data, objection=numbering.objection) if numbering.objection else data


def _user_defined(data: Data, expected: Expected) -> Data:
    """Return a data set of a class that the caller defined, unchanged.

    Raises `UsageError` if a normalisation or a layout is declared, because the class itself reads the examples.
    """
    if expected.normalised is not None or expected.layout is not None:
        raise UsageError(
            f"{data.name} is a {type(data).__name__}, whose own method reads the examples, so data_normalised and "
            "layout cannot be applied; give the arrays (x, y)"
        )
    if expected.probe is not None and len(data):
        expected.probe.suit(data.read(0, min(2, len(data))).x)
    return data


def _collected(pairs: object, n: int | None) -> tuple[object, object]:
    """Return the inputs and labels of a loader or a dataset: all, or the batches that contain the first `n`
    examples.
    """
    if isinstance(pairs, torch.utils.data.Dataset):
        pairs = torch.utils.data.DataLoader(pairs, batch_size=_BATCH if n is None else min(n, _BATCH))
    if not isinstance(pairs, Iterable):
        raise TargetError(
            f"data is a {type(pairs).__name__}; (x, y), a loader, a dataset or a path was expected"
        )
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    read = 0
    for batch in pairs:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TargetError(
                f"the data yield a {type(batch).__name__}; pairs (x, y) of a batch were expected"
            )
        xs.append(torch.as_tensor(batch[0]))
        ys.append(torch.as_tensor(batch[1]))
        read += len(ys[-1]) if ys[-1].dim() else 1
        if n is not None and read >= n:
            break
    if not xs:
        raise TargetError("the data yield no batch; at least one was expected")
    if ys[0].dim() == 0:
        return torch.stack(xs), torch.stack(ys)
    return torch.cat(xs), torch.cat(ys)


def as_array(values: object, what: str) -> Array:
    """Convert a tensor or a sequence to a numpy array. Half precision is converted to float32.

    Raises `TargetError`, whose message describes the values as `what`, if they are not an array.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16, and float16 would round the results of attacks.
        return np.asarray(values.float() if values.dtype in (torch.bfloat16, torch.float16) else values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TargetError(f"the {what} are rows of different shapes: {error}") from error
    if _is_text(array):
        return array.astype(str)
    if array.dtype == object or array.ndim == 0:
        raise TargetError(f"the {what} are a {type(values).__name__}; a tensor or an array was expected")
    return array


def _is_text(array: Array) -> bool:
    return array.ndim > 0 and array.dtype.kind in "OT" and all(isinstance(value, str) for value in array.flat)
