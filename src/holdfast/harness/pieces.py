"""Work on a batch in pieces that memory holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.model import out_of_memory
from holdfast.harness.target import no_memory

_T = TypeVar("_T")


@dataclass
class Room:
    """How many examples go through the model at once; halved for good when memory runs out."""

    size: int
    known: Mapping[int, int] = field(default_factory=dict)
    """sizes that an earlier attempt at this work went on with, by the row it had come to"""
    halved: Callable[[int, int], None] = field(default=lambda row, size: None)
    """called with the row at which memory ran out and the next size, before that is tried"""
    progress: Callable[[int], None] = field(default=lambda n: None)
    """called with the number of examples that were just finished"""


def in_pieces(work: Callable[[Batch], dict[str, Tensor]], batch: Batch, room: Room) -> dict[str, Tensor]:
    """The work in batches of the room's size; halved and tried again when memory runs out."""
    done: list[dict[str, Tensor]] = []
    start = 0

    def next_piece(size: int) -> tuple[int, dict[str, Tensor]]:
        rows = torch.arange(start, min(start + size, len(batch)), device=batch.ids.device)
        return len(rows), work(batch.take(rows))

    while start < len(batch):
        n, columns = in_room(next_piece, room, start, len(batch) - start)
        done.append(columns)
        start += n
        room.progress(n)
    return {name: torch.cat([columns[name] for columns in done]) for name in done[0]} if done else {}


def in_room(work: Callable[[int], _T], room: Room, row: int, left: int) -> _T:
    """What `work` returns where it may pass so many examples at once; halved and tried again when memory runs out.

    `left` examples, from `row` on, are still to be passed.
    """
    room.size = room.known.get(row, room.size)
    while True:
        try:
            return work(room.size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if room.size == 1:
                raise no_memory(1, error) from error
            room.size = max(1, min(room.size, left) // 2)
            room.halved(row, room.size)
