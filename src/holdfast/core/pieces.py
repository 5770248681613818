"""Processing of a batch in pieces that fit into memory. If memory runs out, the size of the pieces is halved."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import out_of_memory

_T = TypeVar("_T")
PIECE = 256
"""default number of examples in a piece"""


@dataclass
class Room:
    """Number of examples that are processed at once in a shard. If memory runs out, it is halved for the rest of the
    shard.
    """

    size: int
    known: Mapping[int, int] = field(default_factory=dict)
    """numbers of examples with which an earlier attempt continued, by the row at which memory ran out"""
    halved: Callable[[int, int], None] = field(default=lambda row, size: None)
    """function that is called with the row at which memory ran out and the next size, before that size is tried"""
    progress: Callable[[int], None] = field(default=lambda n: None)
    """function that is called with the number of examples that were just finished"""

    def enter(self, row: int) -> int:
        """Return the number of examples to process at once from the position `row` of a shard on. It is at most the
        number with which an earlier attempt continued there.
        """
        self.size = min(self.size, self.known.get(row, self.size))
        return self.size

    def halve(self, row: int, n_left: int, error: BaseException) -> None:
        """Halve the number of examples that are processed at once, because memory ran out. An `error` with another
        cause is raised again.

        `n_left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
        example.
        """
        self.size = half_batch(min(self.size, n_left), error)
        self.halved(row, self.size)


def half_batch(size: int, error: BaseException) -> int:
    """Return half of the batch size `size`, with which memory ran out.

    Raises `TargetError` if it is one example, and `error` again if it has another cause than missing memory.
    """
    if not out_of_memory(error):
        raise error
    if size == 1:
        raise no_memory(1, error) from error
    return size // 2


class Pieces:
    """The pieces of a batch that fit into memory, as an iterator, and the columns that are computed from them.

        pieces = Pieces(batch, room)
        for piece in pieces:
            with pieces.attempt():
                pieces.add(compute(piece))
        columns = pieces.columns()

    If memory runs out inside `attempt`, the size of `room` is halved, and the next piece starts at the same example.
    """

    def __init__(self, batch: Batch, room: Room, first: int = 0) -> None:
        """Create the pieces of a batch whose first example is at the row `first` of its shard."""
        self._batch, self._room, self._first = batch, room, first
        self._start, self._stop = 0, 0
        self._done: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[Batch]:
        """Yield the next piece until all examples are processed."""
        n = len(self._batch)
        while self._start < n:
            self._stop = min(self._start + self._room.enter(self._first + self._start), n)
            yield self._batch.take(torch.arange(self._start, self._stop, device=self._batch.ids.device))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Context manager for processing one piece of a batch. If memory runs out inside it, the size of the next
        pieces is halved; other errors are raised.
        """
        try:
            yield
        # torch reports missing memory as a `RuntimeError`; `halve` raises all other errors again
        except (RuntimeError, MemoryError) as error:
            self._room.halve(self._first + self._start, len(self._batch) - self._start, error)

    def add(self, columns: dict[str, Tensor]) -> None:
        """Append the columns that were computed from the current piece to those of the earlier pieces."""
        self._done.append(columns)
        self._room.progress(self._stop - self._start)
        self._start = self._stop

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of all pieces concatenated, in the order of the examples. There are none for an empty
        batch.
        """
        first = self._done[0] if self._done else {}
        return {name: torch.cat([columns[name] for columns in self._done]) for name in first}


def in_pieces(work: Callable[[Batch], dict[str, Tensor]], batch: Batch, room: Room) -> dict[str, Tensor]:
    """Call `work` for pieces of a batch that fit into memory, and return the columns of all pieces, concatenated in the
    order of the examples.
    """
    pieces = Pieces(batch, room)
    for piece in pieces:
        with pieces.attempt():
            pieces.add(work(piece))
    return pieces.columns()


def results_in_pieces(data: Batch, work: Callable[[Batch], _T], size: int = PIECE) -> list[_T]:
    """Call `work` for pieces of at most `size` examples, and return the list of its results in order. If memory runs
    out, the size is halved.

    The result for an example must not depend on the other examples.
    """
    results: list[_T] = []
    room, start = Room(size), 0
    while start < len(data):
        rows = torch.arange(start, min(start + room.size, len(data)), device=data.ids.device)
        try:
            results.append(work(data.take(rows)))
        except (RuntimeError, MemoryError) as error:
            room.halve(start, len(data) - start, error)
            continue
        start += len(rows)
    return results


def in_room(work: Callable[[int], _T], room: Room, row: int, n_left: int) -> _T:
    """Return the result of `work` for as many examples at once as fit into memory. If memory runs out, the number is
    halved and `work` is called again.

    `n_left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
    example.
    """
    while True:
        try:
            return work(room.enter(row))
        except (RuntimeError, MemoryError) as error:
            room.halve(row, n_left, error)


def no_memory(n: int, error: BaseException) -> TargetError:
    """Return the error for memory that is too small for `n` examples, where `n` is the smallest possible batch size."""
    many = "one example" if n == 1 else f"{n} examples"
    way_out = "give it a machine or a device with more, or a smaller model"
    return TargetError(f"memory ran out with {many} at a time ({error}); {way_out}")
