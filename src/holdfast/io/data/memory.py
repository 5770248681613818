"""Makes data sets from Python objects: tensors, arrays, torch loaders and torch datasets."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import sparse
from torch import Tensor

from holdfast.core.batch import UNLABELLED, Data
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.core.remedies import Remedy
from holdfast.io.data.arrays import SUPPORTED, Array, from_numpy
from holdfast.io.data.class_numbers import numbered
from holdfast.io.data.expected import Expected
from holdfast.io.data.labels import whole_numbers
from holdfast.io.data.pictures import pixels_of

_BATCH = 256
"""Number of items of a dataset that are read at a time."""
_INPUTS = ("pixel_values", "input_values", "image", "img", "x")
"""Entries of batches that are the inputs by default: those of the models and of the data sets of Hugging Face."""
_TOKENS = ("input_ids",)
"""Entries of batches that are ids of tokens, in the data sets of Hugging Face."""
_LABELS = ("labels", "label", "y")
"""Entries of batches that are the labels by default."""

_LABELLED = "one label for each input was expected: give (x, y), or a loader or dataset of such pairs"
"""end of the messages for inputs without labels"""


def as_data(
    x: object,
    y: object = None,
    *,
    name: str = "data in memory",
    expected: Expected | None = None,
    n: int | None = None,
    entries: tuple[str | None, str | None] = (None, None),
) -> Data:
    """Return a data set made from inputs `x` and labels `y`, or from a loader or dataset of pairs or of mappings. A
    `Data` object is returned unchanged.

    The layout of tensors is preserved, whatever their type, as are the types float32 and float64. numpy arrays are
    interpreted as in an `.npz` file. String labels are class names. A loader is read once, into memory, and only up to
    its first `n` examples if `n` is given. `entries` are the names of the inputs and of the labels in mappings, if they
    are not the usual ones. `expected` declares properties of the data.
    """
    expected = expected or Expected()
    if y is None and isinstance(x, Tensor | np.ndarray) and not expected.needs_labels:
        y, expected = np.full(len(x), UNLABELLED), replace(expected, checks_labels=False)
    if y is None:
        if isinstance(x, Data):
            return _user_defined(x, expected)
        if isinstance(x, Mapping) or (isinstance(x, tuple) and len(x) == 2):
            x, y = _pair(x, entries)
        else:
            x, y = _collected(x, n, entries)
    if y is None:
        raise TargetError(f"the labels are None; {_LABELLED}")
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
    return data.labelled(numbering)


def _user_defined(data: Data, expected: Expected) -> Data:
    """Return a data set of a class that the caller defined, unchanged.

    Raises `UsageError` if a normalisation or a layout is declared, because the class itself reads the examples.
    """
    if expected.normalised is not None or expected.layout is not None:
        raise UsageError(
            f"{data.name} is {kind_of(data)}, whose own method reads the examples, so data_normalised and "
            "layout cannot be applied; give the arrays (x, y)"
        )
    if expected.probe is not None and len(data):
        expected.probe.suit(data.read(0, min(2, len(data))).x)
    return data


def _collected(
    batches: object, n: int | None, entries: tuple[str | None, str | None]
) -> tuple[object, object]:
    """Return the inputs and labels of a loader or a dataset: all, or the batches that contain the first `n`
    examples.
    """
    if isinstance(batches, Tensor | np.ndarray):
        raise TargetError(f"data is {kind_of(batches)} without labels; {_LABELLED}")
    if isinstance(batches, torch.utils.data.Dataset):
        batches = torch.utils.data.DataLoader(batches, batch_size=_BATCH if n is None else min(n, _BATCH))
    if isinstance(batches, torch.utils.data.DataLoader):
        from holdfast.io.data.loaders import in_order  # only for a loader

        batches = in_order(batches)
    if not isinstance(batches, Iterable):
        raise TargetError(f"data is {kind_of(batches)}; (x, y), a loader, a dataset or a path was expected")
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    read = 0
    for batch in batches:
        x, y = tensors_in(batch, entries)
        xs.append(x)
        ys.append(y)
        read += len(ys[-1]) if ys[-1].dim() else 1
        if n is not None and read >= n:
            break
    if not xs:
        raise TargetError("the data yield no batch; at least one was expected")
    if {each.shape[ys[0].dim() :] for each in xs} != {xs[0].shape[ys[0].dim() :]}:
        raise TargetError(
            f"the inputs have the shapes {', '.join(map(str, {tuple(each.shape) for each in xs}))}; give inputs of one "
            "shape"
        )
    joined = torch.stack if ys[0].dim() == 0 else torch.cat
    return joined(xs), joined(ys)


def tensors_in(batch: object, entries: tuple[str | None, str | None]) -> tuple[Tensor, Tensor]:
    """Return the inputs and the labels of a batch, which is a pair, or a mapping with names, as tensors."""
    x, y = _pair(batch, entries)
    inputs = torch.from_numpy(pixels_of(x)) if isinstance(x, Image.Image) else torch.as_tensor(x)
    return inputs, torch.as_tensor(y)


def _pair(batch: object, entries: tuple[str | None, str | None]) -> tuple[object, object]:
    """Return the inputs and the labels of a batch, which is a pair, or a mapping with names."""
    if isinstance(batch, Mapping):
        return batch[_entry(batch, entries[0], "x", _INPUTS)], batch[_entry(batch, entries[1], "y", _LABELS)]
    if given := [
        f"{key}={name!r}" for key, name in zip(("x", "y"), entries, strict=True) if name is not None
    ]:
        raise UsageError(
            f"{', '.join(given)} is the name of an entry, but the data yield {kind_of(batch)}, which has no "
            "named entries",
            *(Remedy(part.partition("=")[0], function="open_data") for part in given),
        )
    if isinstance(batch, Tensor | np.ndarray) or (isinstance(batch, (tuple, list)) and len(batch) == 1):
        raise TargetError(f"the data yield inputs without labels; {_LABELLED}")
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TargetError(
            f"the data yield {kind_of(batch)}; pairs (x, y) of a batch, or mappings such as "
            "{'pixel_values': x, 'labels': y}, were expected"
        )
    return batch[0], batch[1]


def _entry(batch: Mapping[str, object], name: str | None, argument: str, usual: tuple[str, ...]) -> str:
    """Return the name of the inputs or of the labels in a batch. Raises `TargetError` if it is not unique."""
    sought_inputs = (name,) if name is not None else (*_INPUTS, *_TOKENS)
    if argument == "x" and next((each for each in sought_inputs if each in batch), None) in _TOKENS:
        raise TargetError(
            f"the batches are mappings with the entries {', '.join(map(str, batch))}. {SUPPORTED}"
        )
    candidates = [each for each in ((name,) if name is not None else usual) if each in batch]
    if len(candidates) == 1:
        return candidates[0]
    what = "inputs" if argument == "x" else "labels"
    sought = repr(name) if name is not None else f"one of {', '.join(usual)}"
    others = candidates or [each for each in batch if each not in (*_INPUTS, *_LABELS)] or list(batch)
    raise TargetError(
        f"the batches are mappings with the entries {', '.join(map(str, batch))}; {sought} was expected as the {what}",
        *(Remedy(argument, str(each), function="open_data") for each in others[:3]),
    )


_INSPECTED = 1000
"""Number of values whose types an error message states."""


def as_array(values: object, what: str) -> Array:
    """Convert a tensor or a sequence to a numpy array. Half precision is converted to float32.

    Raises `TargetError`, whose message describes the values as `what`, if they are not an array.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16, and float16 would round the results of attacks.
        return np.asarray(values.float() if values.dtype in (torch.bfloat16, torch.float16) else values)
    if sparse.issparse(values):
        return _dense(values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TargetError(f"the {what} are rows of different shapes: {error}") from error
    if _is_text(array):
        return array.astype(str)
    if array.dtype == object or array.ndim == 0:
        kinds = sorted({type(value).__name__ for value in array.flat[:_INSPECTED]}) if array.ndim else []
        of = f" of {' and '.join(kinds)}" if kinds else ""
        raise TargetError(f"the {what} are {kind_of(values)}{of}; numbers, or only texts, were expected")
    return array


def _dense(matrix: Any) -> Array:
    """Convert a sparse matrix to an array of float32. Raises `TargetError` if the array does not fit into memory."""
    try:
        return np.asarray(matrix.astype(np.float32).toarray())
    except MemoryError as error:
        raise TargetError(
            f"the inputs are a sparse matrix of shape {matrix.shape}, which does not fit into memory as an array; give "
            "fewer rows, as in x[:1000]"
        ) from error


def _is_text(array: Array) -> bool:
    return array.ndim > 0 and array.dtype.kind in "OT" and all(isinstance(value, str) for value in array.flat)
