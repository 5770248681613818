"""Batches that are passed in pieces, which are halved where memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import out_of_memory

PIECE = 256
"""Examples that are passed at once."""
T = TypeVar("T")


def in_pieces(data: Batch, seen: Callable[[Batch], T]) -> list[T]:
    """What `seen` says of each piece, in order.

    What it says of an example must not depend on the others beside it. Raises `TargetError` where memory holds no
    single one.
    """
    found: list[T] = []
    rows, size = torch.arange(len(data), device=data.x.device), PIECE
    while len(rows):
        try:
            found.append(seen(data.take(rows[:size])))
            rows = rows[size:]
        except (RuntimeError, MemoryError) as error:
            size = halved(min(size, len(rows)), error)
    return found


def halved(size: int, error: BaseException) -> int:
    """Half of so many examples that memory ran out for; raises whatever else went wrong, and what no half mends."""
    if not out_of_memory(error):
        raise error
    if size == 1:
        raise TargetError(
            "memory ran out for a batch of one example; train a smaller network, or on another --device"
        ) from error
    return size // 2
