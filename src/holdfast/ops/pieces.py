"""Processing of a batch in pieces that fit into memory."""

from collections.abc import Callable, Mapping
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
    """The number of examples in one pass of a shard. It is halved for the rest of the shard if memory runs out."""

    size: int
    known: Mapping[int, int] = field(default_factory=dict)
    """numbers of examples with which an earlier attempt continued, by the row at which memory ran out"""
    halved: Callable[[int, int], None] = field(default=lambda row, size: None)
    """function that is called with the row at which memory ran out and the next size, before that size is tried"""
    progress: Callable[[int], None] = field(default=lambda n: None)
    """function that is called with the number of examples that were just finished"""

    def enter(self, row: int) -> int:
        """Return the number of examples in a pass from this row on: at most that with which an earlier attempt
        continued here.
        """
        self.size = min(self.size, self.known.get(row, self.size))
        return self.size

    def halve(self, row: int, left: int, error: BaseException) -> None:
        """Halve the size after `error`; an error with another cause than missing memory is raised again.

        `left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
        example.
        """
        self.size = half_batch(min(self.size, left), error)
        self.halved(row, self.size)


def half_batch(size: int, error: BaseException) -> int:
    """Return half of a number of examples for which memory ran out.

    Raises `TargetError` if it is one example, and `error` again if it has another cause than missing memory.
    """
    if not out_of_memory(error):
        raise error
    if size == 1:
        raise no_memory(1, error) from error
    return size // 2


def in_pieces(work: Callable[[Batch], dict[str, Tensor]], batch: Batch, room: Room) -> dict[str, Tensor]:
    """Apply `work` to pieces of the batch and concatenate the columns; halve the size of `room` if memory runs out."""
    done: list[dict[str, Tensor]] = []
    start = 0
    while start < len(batch):
        rows = torch.arange(start, min(start + room.enter(start), len(batch)), device=batch.ids.device)
        try:
            columns = work(batch.take(rows))
        except (RuntimeError, MemoryError) as error:
            room.halve(start, len(batch) - start, error)
            continue
        done.append(columns)
        start += len(rows)
        room.progress(len(rows))
    return {name: torch.cat([columns[name] for columns in done]) for name in done[0]} if done else {}


def results_in_pieces(data: Batch, work: Callable[[Batch], _T], size: int = PIECE) -> list[_T]:
    """Return the results of `work` for pieces of at most `size` examples, in order; see `in_pieces`.

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


def in_room(work: Callable[[int], _T], room: Room, row: int, left: int) -> _T:
    """Return `work(room.size)`; halve the size and try again if memory runs out.

    `left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
    example.
    """
    while True:
        try:
            return work(room.enter(row))
        except (RuntimeError, MemoryError) as error:
            room.halve(row, left, error)


def no_memory(n: int, error: BaseException) -> TargetError:
    """Return the error for memory that is too small for `n` examples, the smallest batch."""
    many = "one example" if n == 1 else f"{n} examples"
    way_out = "give it a machine or a --device with more, or a smaller model"
    return TargetError(f"memory ran out with {many} at a time ({error}); {way_out}")
