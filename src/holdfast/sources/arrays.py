"""Arrays as a data set: checked once at the door, kept as they came, and turned into inputs slice by slice."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds

CHANNELS = (1, 3, 4)
"""grey, colour, colour with transparency"""
_CHUNK = 4096
_ROUNDING = 1e-6
"""how far a float may lie outside the bounds and still count as inside"""

Array = NDArray[Any]


@dataclass(frozen=True)
class Arrays:
    """Examples in memory; bytes stay bytes until they are read."""

    name: str
    x: Array
    """uint8 or float, (N, …); images with the channels first"""
    y: NDArray[np.int64]
    ids: NDArray[np.int64]
    """source row of each example"""
    classes: tuple[str, ...] | None = None
    scale: float = 1.0
    """what the stored values are divided by"""
    notes: tuple[str, ...] = ()
    """said in the report"""

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the shape, the stored values, the labels and the ids."""
        digest = hashlib.sha256(f"{self.x.dtype} {self.x.shape} {self.scale}".encode())
        for start in range(0, len(self.x), _CHUNK):
            digest.update(np.ascontiguousarray(self.x[start : start + _CHUNK]).tobytes())
        digest.update(self.y.tobytes())
        digest.update(self.ids.tobytes())
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop`, as floats."""
        rows = slice(start, stop)
        stored = torch.from_numpy(np.array(self.x[rows], order="C"))
        x = stored if stored.is_floating_point() else stored.float()
        if self.scale != 1.0:
            x = x / self.scale
        return Batch(x, torch.from_numpy(self.y[rows].copy()), torch.from_numpy(self.ids[rows].copy()))


def selected_rows(
    n_rows: int, *, n: int | None, sample: int | None, seed: int, name: str
) -> NDArray[np.int64]:
    """Rows to keep, ascending: the first `n`, a seeded sample, or all."""
    if n is not None and sample is not None:
        raise UsageError(
            f"-n {n} and --sample {sample} exclude each other: give the first N, or N drawn by seed"
        )
    for flag, wanted in (("-n", n), ("--sample", sample)):
        if wanted is not None and wanted < 1:
            raise UsageError(f"{flag} is {wanted}; at least one example is needed")
    if n_rows == 0:
        raise TargetError(f"{name} is empty; at least one example is needed")
    if sample is not None and sample < n_rows:
        return np.sort(np.random.default_rng(seed).choice(n_rows, sample, replace=False)).astype(np.int64)
    return np.arange(min(n or n_rows, n_rows), dtype=np.int64)


def labels(
    y: Array, n_rows: int, *, classes: int | None, name: str, lenient: bool = False
) -> NDArray[np.int64]:
    """Labels as int64, one an example, 0 to classes - 1 unless `lenient`; refuses what cannot be meant."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and len(y) == n_rows:
        raise TargetError(f"the labels of {name} have shape {y.shape}, as one-hot rows; give y.argmax(1)")
    if y.ndim != 1:
        raise TargetError(
            f"the labels of {name} have shape {y.shape}; one whole number an example was expected"
        )
    if len(y) != n_rows:
        raise TargetError(
            f"{name} has {n_rows} examples and {len(y)} labels; one label an example was expected"
        )
    if y.dtype.kind not in "iub":
        raise TargetError(
            f"the labels of {name} are {y.dtype}; whole numbers (int64) were expected, "
            + ("as y.astype('int64')" if y.dtype.kind == "f" else "as np.unique(y, return_inverse=True)[1]")
        )
    y = y.astype(np.int64)
    if lenient:
        return y
    if len(y) and y.min() < 0:
        raise TargetError(
            f"the labels of {name} hold {y.min()}; classes count from 0: drop rows without one, or number them anew"
        )
    if classes is not None and len(y) and y.max() >= classes:
        off_by_one = "; they seem to count from 1: subtract 1" if y.min() == 1 and y.max() == classes else ""
        raise TargetError(
            f"the labels of {name} hold {y.max()}, but there are {classes} classes (0 to {classes - 1}){off_by_one}"
        )
    return y


def channels_first(x: Array, name: str) -> tuple[Array, tuple[str, ...]]:
    """Images as N x C x H x W, with a note if they were not; tables (N, features) as they are."""
    if x.ndim == 2:
        return x, ()
    if x.ndim == 3:
        return x[:, None], ()
    if x.ndim != 4:
        raise TargetError(
            f"the inputs of {name} have shape {x.shape}; "
            "(N, features), (N, H, W), (N, H, W, C) or (N, C, H, W) was expected"
        )
    if x.shape[1] in CHANNELS or x.shape[3] not in CHANNELS:
        return x, ()
    return np.moveaxis(x, 3, 1), ("the channels came last and were put first",)


def from_numpy(
    name: str,
    x: Array,
    y: Array,
    ids: NDArray[np.int64],
    *,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    bounds: Bounds | None = None,
    notes: tuple[str, ...] = (),
    lenient: bool = False,
) -> Arrays:
    """Check rows that were selected already, and keep them as a data set.

    `lenient` lets values outside the bounds and labels outside the classes through; the bounds still say how bytes are
    read.
    """
    bounds = bounds or Bounds()
    if len(x) == 0:
        raise TargetError(f"{name} is empty; at least one example is needed")
    known = None if class_names is None else len(class_names)
    y = labels(y, len(x), classes=known if classes is None else classes, name=name, lenient=lenient)
    x, moved = channels_first(x, name)
    stored, scale, said = _stored(x, bounds, name)
    names = None if class_names is None else tuple(class_names)
    data = Arrays(name, np.ascontiguousarray(stored), y, ids, names, scale, (*notes, *moved, *said))
    check_inputs(data, bounds, lenient=lenient)
    return data


def check_inputs(data: Arrays, bounds: Bounds, *, lenient: bool = False) -> None:
    """Refuse floats that are not finite or lie outside the bounds; bytes divided by 255 cannot be.

    `lenient` refuses only what is not finite.
    """
    if data.x.dtype == np.uint8 and data.scale == 255.0 and _is_unit(bounds):
        return
    lowest, highest, outside = np.inf, -np.inf, False
    for start in range(0, len(data), _CHUNK):
        batch = data.read(start, start + _CHUNK)
        bad = ~torch.isfinite(batch.x).flatten(1).all(1) if batch.x.dim() > 1 else ~torch.isfinite(batch.x)
        if bad.any():
            raise TargetError(
                f"{data.name} holds NaN or infinity, first in row {int(batch.ids[bad][0])}; fill or drop such rows"
            )
        lowest, highest = min(lowest, float(batch.x.min())), max(highest, float(batch.x.max()))
        outside |= _outside(batch.x, bounds, data.name)
    if outside and not lenient:
        raise TargetError(_range_message(data, lowest, highest, bounds))


def _outside(x: Tensor, bounds: Bounds, name: str) -> bool:
    low, high = bounds.like(x)
    try:
        slack = _ROUNDING * (high - low)
        return bool(((x < low - slack) | (x > high + slack)).any())
    except RuntimeError as error:
        raise UsageError(
            f"the bounds have shape {tuple(low.shape)}, the inputs of {name} {tuple(x.shape[1:])}"
        ) from error


def _range_message(data: Arrays, lowest: float, highest: float, bounds: Bounds) -> str:
    found = f"the inputs of {data.name} range from {lowest:.6g} to {highest:.6g}; "
    wanted = f"{_side(bounds.low)} to {_side(bounds.high)} was expected. "
    # A table of pixels shows itself by its largest value; any other has features of its own scales.
    if data.x.ndim == 2 and highest != 255:
        return (
            found
            + wanted
            + f"Scale the features as in training, or say what the model takes with --bounds {lowest:.6g},{highest:.6g}"
        )
    if 1 < highest <= 255 and lowest >= 0 and _is_unit(bounds):
        return (
            found
            + wanted
            + "Divide them by 255 (or save them as uint8), or say what the model takes with --bounds"
        )
    return (
        found + wanted + f"Scale them, or say what the model takes with --bounds {lowest:.6g},{highest:.6g}"
    )


def _side(side: float | Tensor) -> str:
    return (
        f"{side:g}" if isinstance(side, (int, float)) else f"[{float(side.min()):g} … {float(side.max()):g}]"
    )


def _is_unit(bounds: Bounds) -> bool:
    return isinstance(bounds.low, (int, float)) and (bounds.low, bounds.high) == (0, 1)


def _stored(x: Array, bounds: Bounds, name: str) -> tuple[Array, float, tuple[str, ...]]:
    """Values as they are kept, what divides them, and what is worth saying."""
    if x.dtype == np.bool_:
        return x.astype(np.uint8), 1.0, ()
    if x.dtype == np.uint8:
        if x.ndim == 2 and x.max() <= 1:
            return x, 1.0, ("the features are 0 or 1 and were not divided by 255",)
        if isinstance(bounds.high, (int, float)) and (bounds.low, bounds.high) == (0, 255):
            return x, 1.0, ("the bounds are 0 to 255, so the bytes were not divided by 255",)
        return x, 255.0, ()
    if x.dtype.kind == "f":
        return x.astype(np.float32, copy=False), 1.0, ()
    raise TargetError(
        f"the inputs of {name} are {x.dtype}; uint8 (0 to 255) or floats inside the bounds were expected"
    )
