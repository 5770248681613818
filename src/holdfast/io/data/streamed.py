"""Training examples that are read by index when they are used, from a torch data set or loader, or from data whose
inputs are larger than a share of the memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby, repeat
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from holdfast.core.batch import IN_MEMORY_BYTES, Batch, Data, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.types import Ids, Inputs, Labels
from holdfast.io.data import loaders
from holdfast.io.data.arrays import Arrays, check_inputs, from_numpy
from holdfast.io.data.labels import class_labels, numbered, whole_numbers
from holdfast.io.data.layouts import DeclaredData

_CHUNK_BYTES = 1 << 22
"""Size in bytes of the inputs that are read at a time when all examples are read once."""
_MOST_READ = 256
"""Largest number of examples that are read at a time."""
_COMPARED = 32
"""Number of examples that are read several times, spread over the data."""
_SIZE_OF_FLOAT = 4  # bytes
_NAME = "the training data"
_FIXED = Draws(0).at("reading")
"""Random numbers for examples that are read outside of the training."""


@dataclass(frozen=True)
class Streamed:
    """Training examples whose inputs are read by index. Labels, ids and a hash of each input are in memory."""

    source: loaders.Source
    inputs_of: Callable[[Any], Inputs]
    """function that returns the inputs of a batch of the source"""
    places: tuple[int, ...]
    """index of each example in the source"""
    y: Labels
    ids: Ids
    hashes: tuple[bytes, ...]
    example_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """notes for the report on how the examples are read"""
    changing: int | None = None
    """index of an example that differed between two readings; None if there was none"""

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: Tensor) -> Batch:
        """Return some of the examples in memory, chosen by their positions or by a boolean mask."""
        rows = self._positions(rows)
        if not len(rows):
            return self.first(1).take(rows)
        parts = [rows[part] for part in _chunks(len(rows), self.example_shape)]
        with self.reading(parts, _FIXED) as batches:
            first = next(batches)
            x, stop = first.x.new_empty((len(rows), *self.example_shape)), 0
            for batch in chain([first], batches):  # not concatenated, which would need twice the memory
                start, stop = stop, stop + len(batch)
                x[start:stop] = batch.x
        return Batch(x, self.y[rows], self.ids[rows])

    def first(self, n: int) -> Batch:
        """Return the first `n` examples in memory, or all if there are fewer."""
        return self.take(torch.arange(min(n, len(self)), device=self.ids.device))

    def subset(self, rows: Tensor) -> "Streamed":
        """Return some of the examples, without reading their inputs."""
        rows = self._positions(rows)
        positions = rows.tolist()
        return replace(
            self,
            places=tuple(self.places[position] for position in positions),
            hashes=tuple(self.hashes[position] for position in positions),
            y=self.y[rows],
            ids=self.ids[rows],
        )

    def labelled(self, y: Labels) -> "Streamed":
        """Return the same examples with other labels `y` (n)."""
        return replace(self, y=y)

    def to(self, device: torch.device) -> "Streamed":
        """Return the same examples, whose batches are moved to `device` after they are read."""
        return replace(self, y=self.y.to(device), ids=self.ids.to(device))

    def fingerprints(self) -> tuple[bytes, ...]:
        """Return a hash of the input of each example."""
        return self.hashes

    @contextmanager
    def reading(self, batches: Sequence[Tensor], rng: Draws) -> Iterator[Iterator[Batch]]:
        """Context manager that yields an iterator over the examples at the positions in each of `batches`. Consecutive
        equal batches are read once, and worker processes read ahead.
        """
        groups = [list(group) for _, group in groupby(batches, key=id)]
        several = [(self._positions(group[0]), len(group)) for group in groups]
        order = (
            ([self.places[row] for row in rows.tolist()], rng.bits(self.ids[rows]).tolist())
            for rows, _ in several
        )
        with self.source.reading(order) as collated:
            yield self._batches(several, collated)

    def _batches(self, several: Sequence[tuple[Tensor, int]], collated: Iterator[Any]) -> Iterator[Batch]:
        for (rows, n), examples in zip(several, collated, strict=True):
            x = self.inputs_of(examples)
            batch = Batch(x.to(self.ids.device), self.y[rows], self.ids[rows])
            for _ in range(n):
                yield batch

    def _positions(self, rows: Tensor) -> Tensor:
        return (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows).to(self.ids.device)


def training_data(data: Data) -> TrainingData:
    """Return the examples of a data set in memory, or by index if their inputs are too large for it."""
    n, shape = len(data), tuple(data.read(0, 1).x.shape[1:])
    size = _SIZE_OF_FLOAT * n * math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return data.read(0, n)
    batches = (data.read(rows[0], rows[-1] + 1) for rows in _chunks(n, shape))
    ys, ids, hashes = zip(*((each.y, each.ids, each.fingerprints()) for each in batches), strict=True)
    note = (
        f"the inputs of {n:,} training examples would take {size / 2**30:.1f} GiB in memory, so they are read by index "
        "when they are used"
    )
    return Streamed(
        loaders.Source(loaders.RowsOfData(data), collate=loaders.unchanged),
        attrgetter("x"),
        tuple(range(n)),
        torch.cat(ys),
        torch.cat(ids),
        tuple(chain.from_iterable(hashes)),
        shape,
        (note,),
    )


def _chunks(n: int, shape: tuple[int, ...]) -> list[list[int]]:
    """Rows that are read at a time when all examples are read once."""
    size = min(max(_CHUNK_BYTES // (_SIZE_OF_FLOAT * math.prod(shape)), 1), _MOST_READ)
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def open_by_index(
    data: object, expected: DeclaredData, *, entries: tuple[str | None, str | None] = (None, None)
) -> Streamed | None:
    """Return the examples of a torch data set, or of the data set of a loader, as training examples that are read by
    index. Return None if they cannot be read in another order than that of the loader.

    All examples are read once, and are checked. Random numbers are seeded for each example. Some examples are read with
    equal and with other seeds, to state whether they change, and whether they do so with equal seeds too.
    """
    order = loaders.index_order(data)
    if order is None:
        return None
    if not len(order):
        raise TargetError("the data set of the training is empty; at least one example is needed")
    places, compared = tuple(order), _compared(len(order))
    reader = _Reader(_source(data), places, entries)
    x, changing, unrepeated = reader.compared(compared)
    repeatable = unrepeated is None
    converted = _Converted(_converted_as(x, compared, expected), x.dtype, tuple(x.shape[1:]), entries)
    shape = tuple(converted.of(x).x.shape[1:])
    y, hashes = reader.checked(converted, _chunks(len(places), shape), expected)
    if not repeatable:  # else no run could be resumed
        hashes = tuple(str(row).encode() for row in range(len(places)))
    notes = (_note_on_order(data), *_notes_on_changes(changing, repeatable=repeatable))
    return Streamed(
        reader.source, converted, places, y, torch.arange(len(places)), hashes, shape, notes, changing
    )


def changing_example(data: object, entries: tuple[str | None, str | None]) -> int | None:
    """Return the index of an example of a torch data set or loader that differs between two readings, or None."""
    order = loaders.index_order(data)
    if not order:
        return None
    return _Reader(_source(data), tuple(order), entries).compared(_compared(len(order)))[1]


def _compared(n: int) -> list[int]:
    """Rows of `n` that are read several times."""
    rows: list[int] = np.unique(np.linspace(0, n - 1, min(_COMPARED, n)).astype(int)).tolist()
    return rows


def _source(data: Any) -> loaders.Source:
    """The data set of a loader, or a data set, which is then read in this process."""
    if not isinstance(data, DataLoader):
        return loaders.Source(data, seeded=True)
    return loaders.Source(
        data.dataset,
        collate=data.collate_fn,
        options=loaders.options_of(data),
        begin=data.worker_init_fn,
        seeded=True,
    )


@dataclass(frozen=True)
class _Reader:
    """Reads the examples of a torch data set as they are stored, before the training."""

    source: loaders.Source
    places: tuple[int, ...]
    entries: tuple[str | None, str | None]

    def read(
        self, chunks: Sequence[Sequence[int]], seeds: Sequence[Draws] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and the labels in the rows of each chunk, of which each may have its own seeds."""
        order = (
            ([self.places[row] for row in rows], rng.bits(torch.tensor(rows)).tolist())
            for rows, rng in zip(chunks, seeds or repeat(_FIXED), strict=False)
        )
        with self.source.reading(order) as collated:
            for examples in collated:
                yield loaders.tensors_in(examples, self.entries)

    def compared(self, rows: Sequence[int]) -> tuple[Tensor, int | None, int | None]:
        """Read some examples twice with equal seeds and once with others. Return their inputs, and the indices of the
        first one that differs at all and of the first one that differs with equal seeds, or None.
        """
        first, again, other = (x for x, _ in self.read([rows] * 3, (_FIXED, _FIXED, _FIXED.at("other"))))
        unrepeated = self._different(rows, first, again)
        changing = self._different(rows, first, other) if unrepeated is None else unrepeated
        return first, changing, unrepeated

    def _different(self, rows: Sequence[int], one: Tensor, other: Tensor) -> int | None:
        """Index of the first of some examples that differs between two readings, or None."""
        pairs = zip(rows, map(_bytes_of, one), map(_bytes_of, other), strict=True)
        return next((self.places[row] for row, once, again in pairs if once != again), None)

    def checked(
        self, converted: "_Converted", chunks: Sequence[Sequence[int]], expected: DeclaredData
    ) -> tuple[Labels, tuple[bytes, ...]]:
        """Read all examples once. Return their class numbers and a hash of each input."""
        labels: list[Any] = []
        hashes: list[bytes] = []
        for x, stored_labels in self.read(chunks):
            part = converted.of(x, len(hashes))
            check_inputs(part, expected)
            hashes.extend(part.read(0, len(part)).fingerprints())
            # as numbers, because a tensor would keep memory that a worker process shares
            labels.extend(stored_labels.tolist())
        class_numbers = numbered(whole_numbers(np.array(labels)), expected, _NAME).y
        classes = expected.classes or (None if expected.probe is None else expected.probe.classes)
        y = class_labels(class_numbers, len(hashes), expected, classes=classes, name=_NAME)
        return torch.from_numpy(y), tuple(hashes)


def _bytes_of(x: Tensor) -> bytes:
    return x.contiguous().numpy().tobytes()


def _converted_as(x: Tensor, rows: Sequence[int], expected: DeclaredData) -> Arrays:
    """A few examples as a data set, with the conversion to floats that applies to all."""
    resolution = torch.finfo(x.dtype).eps if x.is_floating_point() else None
    return from_numpy(
        _NAME,
        loaders.as_array(x, "inputs"),
        np.zeros(len(rows), np.int64),
        np.array(rows),
        expected,
        preserve=True,
        resolution=resolution,
    )


@dataclass(frozen=True)
class _Converted:
    """Function that returns the inputs of a collated batch as the model takes them."""

    example: Arrays
    dtype: torch.dtype
    shape: tuple[int, ...]
    entries: tuple[str | None, str | None]

    def __call__(self, collated: Any) -> Inputs:
        part = self.of(loaders.tensors_in(collated, self.entries)[0])
        return part.read(0, len(part)).x

    def of(self, x: Tensor, start: int = 0) -> Arrays:
        """Return stored inputs as a data set. Its first row is number `start`."""
        if (x.dtype, tuple(x.shape[1:])) != (self.dtype, self.shape):
            raise TargetError(
                f"an input of {_NAME} has shape {tuple(x.shape[1:])} and type {x.dtype}, and others have shape "
                f"{self.shape} and type {self.dtype}; let the data set return inputs of one shape and type"
            )
        stored = self.example.reading.inputs(loaders.as_array(x, "inputs"))
        return replace(
            self.example,
            x=np.ascontiguousarray(stored, self.example.x.dtype),
            y=np.zeros(len(x), np.int64),
            ids=np.arange(start, start + len(x)),
        )


def _note_on_order(data: Any) -> str:
    note = "the training examples are read by index from the data set, in an order that the seed determines"
    if not isinstance(data, DataLoader):
        return note
    n = data.num_workers
    ahead = (
        "" if not n else " 1 worker process reads ahead;" if n == 1 else f" {n} worker processes read ahead;"
    )
    return f"{note};{ahead} the batch size and the sampler of the loader are not used"


def _notes_on_changes(changing: int | None, *, repeatable: bool) -> tuple[str, ...]:
    if changing is None:
        return ()
    found = f"training example {changing} differs between two readings"
    if repeatable:
        note = (
            f"{found}: the data set changes its examples at random. The random numbers of random, numpy and torch are "
            "seeded for each example and epoch, so that a resumed run has the same result. Held-out examples are "
            "changed once"
        )
        return (note,)
    note = (
        f"{found}, also with equal seeds of random, numpy and torch. A resumed run continues from its checkpoint, but "
        "its result differs from that of a run without interruption, and neither changed nor repeated examples are "
        "found. With a data set that returns equal examples, and the augmentation as the setting augment of the "
        "training, the result is the same"
    )
    return (note,)
