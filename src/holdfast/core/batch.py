"""Batches of examples with labels and ids, the protocols of training examples, operations between one value for each
example and whole inputs, and texts as rows of a tensor.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, model_argument
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Labels, Logits, Mask, Rows


class Lookup:
    """Index of a batch that maps the ids of examples to their positions. Repeated calls with the same tensor of ids use
    a cached result.
    """

    def __init__(self, ids: Ids) -> None:
        self._sorted, self._order = ids.sort()
        self._last: tuple[Ids, Rows] | None = None

    def rows(self, ids: Ids) -> Rows:
        """Return the position of each id in the batch. Raises `KeyError` with the first unknown id."""
        if self._last is None or self._last[0] is not ids:
            self._last = ids, self._positions(ids)
        return self._last[1]

    def _positions(self, ids: Ids) -> Rows:
        if not len(self._sorted):
            at, known = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        else:
            at = torch.searchsorted(self._sorted, ids.contiguous()).clamp_max_(len(self._sorted) - 1)
            known = self._sorted[at] == ids
        if not known.all():
            raise KeyError(int(ids[~known][0]))
        return self._order[at]


CLASSIFIERS_ONLY: Final = (
    "Masks, boxes, numbers and several labels for each example are for assess, certify and explain, which have the "
    "setting task (--task)"
)
"""Sentence about targets that are not classes."""


def off_range(lowest: int, highest: int, classes: int, name: str, *, remote: bool = False) -> TargetError:
    """Return the error for the data set `name`, whose labels range from `lowest` to `highest` and do not fit a
    model with `classes` classes. `remote` means a served model.
    """
    return TargetError(
        f"the labels of {name} range from {lowest} to {highest}, but the model has {classes} classes "
        f"(0 to {classes - 1}); {advice(lowest, highest, classes)}",
        *remedies(lowest, highest, classes, remote=remote),
    )


def advice(lowest: int, highest: int, classes: int) -> str:
    """Return the part of an error message that suggests what to do if labels from `lowest` to `highest` do not fit a
    model with `classes` classes.
    """
    if lowest == 1 and highest == classes:
        return "they appear to count from 1: subtract 1"
    return (
        "check the label column, and that the model was trained on these classes (targets of a regression are no "
        "classes)"
    )


def remedies(lowest: int, highest: int, classes: int, *, remote: bool) -> tuple[Remedy, ...]:
    """Return the changes of arguments by which a served model may have more classes than its responses show."""
    if not remote or lowest < 0 or (lowest == 1 and highest == classes):
        return ()
    number = model_argument("classes", highest + 1)
    return (model_argument("http_labels", True, also=(number,), reason="if the server returns classes"),)


BY_LABEL = "label"
"""Setting of the groups with which the groups are the classes."""
UNLABELLED = -1
"""label of a training example that has no label"""
IN_MEMORY_BYTES = 2 * 2**30
"""Largest size in bytes of the training inputs, as floats, that are in memory as a whole.

It is a fraction of the memory of common machines, because a training needs several copies.
"""


@dataclass(frozen=True)
class Batch:
    """A batch of examples: inputs `x` (n, *features), labels `y` (n), and `ids` (n), which are the row numbers of the
    examples in their data set.

    `target` (n) is the class that a targeted attack must reach; None means that any wrong class counts. In training
    data a label may be `UNLABELLED`. `truth` (n, *truth) is what the outputs of a model with another task than classes
    are compared with (see `holdfast.core.tasks.Task`); the labels are then 0.
    """

    x: Inputs
    y: Labels
    ids: Ids
    target: Labels | None = None
    truth: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> "Batch":
        """Return a batch with some of the examples, chosen by their positions or by a boolean mask."""
        rows = (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows).to(self.x.device)
        target, truth = (None if each is None else each[rows] for each in (self.target, self.truth))
        x = self.x.index_select(0, rows)  # three times as fast as `x[rows]` on a CPU
        return Batch(x, self.y[rows], self.ids[rows], target, truth)

    def at(self, x: Inputs) -> "Batch":
        """Return the same examples with other inputs `x` (n, *features)."""
        return replace(self, x=x)

    def labelled(self, y: Labels) -> "Batch":
        """Return the same examples with other labels `y` (n)."""
        return replace(self, y=y)

    def towards(self, target: Labels | None) -> "Batch":
        """Return the same examples with the target classes `target` (n), or without targets if it is None."""
        return replace(self, target=target)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with all tensors on `device`."""
        target, truth = (None if each is None else each.to(device) for each in (self.target, self.truth))
        return Batch(self.x.to(device), self.y.to(device), self.ids.to(device), target, truth)

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield consecutive batches of at most `size` examples."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            target, truth = (None if each is None else each[rows] for each in (self.target, self.truth))
            yield Batch(self.x[rows], self.y[rows], self.ids[rows], target, truth)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of the input of one example."""
        return tuple(self.x.shape[1:])

    def first(self, n: int) -> "Batch":
        """Return the first `n` examples, or all if there are fewer."""
        return self.take(torch.arange(min(n, len(self)), device=self.ids.device))

    def subset(self, rows: Tensor) -> "Batch":
        """Return some of the examples; the same as `take`."""
        return self.take(rows)

    def fingerprints(self) -> tuple[bytes, ...]:
        """Return a hash of the input of each example."""
        return fingerprints_of(self.x)

    @contextmanager
    def reading(self, batches: Sequence[Tensor], rng: Draws) -> Iterator[Iterator["Batch"]]:
        """Context manager that yields an iterator over the examples at the positions in each of `batches`."""
        yield map(self.take, batches)


def fingerprints_of(x: Inputs) -> tuple[bytes, ...]:
    """Return a hash of the bytes of each input. -0 is treated as 0."""
    rows = x.detach().cpu().contiguous().flatten(1).numpy()
    # Adding zero turns -0 into 0.
    return tuple(hashlib.blake2b(row + 0.0, digest_size=32).digest() for row in rows)


class TrainingData(Protocol):
    """Protocol of training examples. The inputs of a `Batch` are in memory; other implementations read the inputs of a
    batch when it is used, so that they may be larger than memory.
    """

    @property
    def y(self) -> Labels:
        """Labels of all examples, on the device of the training."""

    @property
    def ids(self) -> Ids:
        """Row numbers of all examples in their source, on the device of the training."""

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of the input of one example."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def take(self, rows: Tensor) -> Batch:
        """Return some of the examples in memory, chosen by their positions or by a boolean mask."""

    def first(self, n: int) -> Batch:
        """Return the first `n` examples in memory, or all if there are fewer."""

    def subset(self, rows: Tensor) -> Self:
        """Return some of the examples, chosen by their positions or by a boolean mask, without reading their inputs."""

    def labelled(self, y: Labels) -> Self:
        """Return the same examples with other labels `y` (n)."""

    def to(self, device: torch.device) -> Self:
        """Return the same examples for a training on `device`."""

    def fingerprints(self) -> tuple[bytes, ...]:
        """Return a hash of the input of each example."""

    def reading(self, batches: Sequence[Tensor], rng: Draws) -> AbstractContextManager[Iterator[Batch]]:
        """Context manager that yields an iterator over the examples at the positions in each of `batches`, in their
        order, which may be read ahead.

        `rng` determines the random numbers of a source that changes its examples at random.
        """


@runtime_checkable
class Data(Protocol):
    """Protocol of a data set that is read in slices, so that it may be larger than memory."""

    @property
    def name(self) -> str:
        """Name of the data set, as shown in reports."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None if they are unknown."""

    @property
    def digest(self) -> str:
        """SHA-256 of the selected examples of the data set and their labels, in hexadecimal."""

    def __len__(self) -> int:
        """Return the number of selected examples."""

    def read(self, start: int, stop: int) -> Batch:
        """Return the examples from position `start` up to, but not including, `stop` as a batch, with float inputs,
        int64 labels, and their row numbers in the source as ids.
        """


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number or truth value for each example, so that it broadcasts with the inputs `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def pick(chosen: Mask, one: Inputs, other: Inputs) -> Inputs:
    """Return for each example the input of `one` if `chosen` is true, else that of `other`. The difference between both
    must be finite.

    It uses a weight of exactly 0 or 1, which is four times faster on a CPU than `torch.where` with a broadcast mask. A
    zero may lose its sign.
    """
    return torch.lerp(other, one, spread(chosen.to(one.dtype), one))


def without_missing(batch: Batch, bounds: Bounds) -> Batch:
    """Return the batch with the middle of the valid range in place of missing values; it is the same batch if there are
    none.
    """
    if not batch.x.isnan().any():
        return batch
    low, high = bounds.like(batch.x)
    return batch.at(torch.where(batch.x.isnan(), (low + high) / 2, batch.x))


def with_missing(x_adv: Inputs, x: Inputs, fixed: Tensor | None = None) -> Inputs:
    """Return attacked inputs `x_adv` in which the values that are missing in the clean inputs `x` are missing, too, and
    the `fixed` features, given by truth values, have the clean values.
    """
    kept = x.isnan() if fixed is None else x.isnan() | fixed.to(x.device)
    return torch.where(kept, x, x_adv)


@dataclass(frozen=True)
class ForBatch:
    """Base of wrappers of a model for attacks on a batch, which use what the batch has for each queried row."""

    model: Model
    batch: Batch

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid input values of the model."""
        return self.model.bounds

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.batch.ids)

    def at(self, values: Tensor, ids: Ids | None) -> Tensor:
        """Return those of the `values` of the batch, one for each example, that belong to the rows `ids` (all of them
        if None).
        """
        return values if ids is None else values[self._lookup.rows(ids)]


@dataclass(frozen=True)
class WithMissing(ForBatch):
    """Wrapper of a model for attacks on a batch, with missing values in its inputs where the clean ones have some, and
    the clean values of fixed features.
    """

    fixed: Tensor | None = None

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the inputs `x`, which are the rows `ids` of the batch (all of them if None)."""
        return self.model(with_missing(x, self.at(self.batch.x, ids), self.fixed), ids)


LARGEST = 0x10FFFF
"""Largest Unicode code point."""


def encoded(texts: Sequence[str], width: int) -> Tensor:
    """Return the code points of texts as floats (n, width), padded with zeros.

    No text may be longer than `width`. The end of a text is its last code point that is not 0.

    >>> encoded(["ab", ""], 3).tolist()
    [[97.0, 98.0, 0.0], [0.0, 0.0, 0.0]]
    """
    longest = max(map(len, texts), default=0)
    if longest > width or width < 1:
        raise ValueError(f"width is {width}, and the longest text has {longest} characters")
    array = np.array(list(texts), dtype=f"<U{width}")
    return torch.from_numpy(array.view("<u4").reshape(len(texts), width).astype(np.float32))


def decoded(x: Tensor) -> list[str]:
    """Return the texts of rows of code points (n, width). It is the inverse of `encoded`.

    Values are rounded to whole numbers, and limited to the valid code points.

    >>> decoded(encoded(["ab", ""], 3))
    ['ab', '']
    """
    if not len(x):
        return []
    numbers = x.detach().cpu().double().round().clamp(0, LARGEST).numpy().astype("<u4")
    texts: list[str] = np.ascontiguousarray(numbers).view(f"<U{numbers.shape[1]}")[:, 0].tolist()
    return texts


def array_of_files(contents: Sequence[bytes]) -> NDArray[np.object_]:
    """Return the contents of files as an array of objects (n,). An array of `bytes` would lose zeros at the end."""
    array = np.empty(len(contents), object)
    array[:] = contents
    return array


def encoded_files(contents: Sequence[bytes], width: int) -> Tensor:
    r"""Return the bytes of files as floats (n, width): each byte plus one, padded with zeros.

    No file may have more than `width` bytes.

    >>> encoded_files([b"\0a", b""], 3).tolist()
    [[1.0, 98.0, 0.0], [0.0, 0.0, 0.0]]
    """
    rows = np.zeros((len(contents), width), np.float32)
    for row, content in zip(rows, contents, strict=True):
        row[: len(content)] = np.frombuffer(content, np.uint8)
        row[: len(content)] += 1
    return torch.from_numpy(rows)


def decoded_files(x: Tensor) -> list[bytes]:
    r"""Return the files in rows of bytes plus one (n, width). It is the inverse of `encoded_files`.

    >>> decoded_files(encoded_files([b"\0a", b""], 3))
    [b'\x00a', b'']
    """
    rows = x.detach().cpu().round().clamp(0, 256).numpy().astype(np.int16)
    lengths = (rows > 0).sum(1)
    return [(row[:n] - 1).astype(np.uint8).tobytes() for row, n in zip(rows, lengths, strict=True)]
