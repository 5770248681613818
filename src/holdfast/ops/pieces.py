"""Processes a batch in pieces that fit into memory."""

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
"""Default number of examples in a piece."""


@dataclass
class Room:
    """The number of examples in one pass; halved permanently if memory runs out."""

    size: int
    known: Mapping[int, int] = field(default_factory=dict)
    """sizes that an earlier attempt continued with, by the row at which memory ran out"""
    halved: Callable[[int, int], None] = field(default=lambda row, size: None)
    """called with the row at which memory ran out and the next size, before it is tried"""
    progress: Callable[[int], None] = field(default=lambda n: None)
    """called with the number of examples that were just finished"""

    def enter(self, row: int) -> int:
        """The size from this row on: not more than that with which an earlier attempt continued here."""
        self.size = min(self.size, self.known.get(row, self.size))
        return self.size

    def halve(self, row: int, left: int, error: BaseException) -> None:
        """Halve the size after `error`, which is raised again if it is not that memory ran out.

        `left` examples, from `row` on, are not processed yet. Raises `TargetError` if memory is too small for one
        example.
        """
        self.size = half_batch(min(self.size, left), error)
        self.halved(row, self.size)


def half_batch(size: int, error: BaseException) -> int:
    """Half of a number of examples for which memory ran out. Re-raises other errors; `TargetError` for one example."""
    if not out_of_memory(error):
        raise error
    if size == 1:
        raise no_memory(1, error) from error
    return size // 2


def in_pieces(work: Callable[[Batch], dict[str, Tensor]], batch: Batch, room: Room) -> dict[str, Tensor]:
    """Apply `work` to pieces of the size of `room` and concatenate the columns; halves the size if memory runs out."""
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
    """The error for memory that is too small for the smallest batch."""
    many = "one example" if n == 1 else f"{n} examples"
    way_out = "give it a machine or a --device with more, or a smaller model"
    return TargetError(f"memory ran out with {many} at a time ({error}); {way_out}")
