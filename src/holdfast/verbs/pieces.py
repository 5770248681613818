"""Processes a batch in pieces, which are halved if memory runs out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import out_of_memory

PIECE = 256
"""Largest number of examples in one piece."""
T = TypeVar("T")


def results_in_pieces(data: Batch, seen: Callable[[Batch], T]) -> list[T]:
    """The results of `seen` for each piece, in order.

    The result for an example must not depend on the other examples. Raises `TargetError` if memory is too small for
    one example.
    """
    found: list[T] = []
    rows, size = torch.arange(len(data), device=data.x.device), PIECE
    while len(rows):
        try:
            found.append(seen(data.take(rows[:size])))
            rows = rows[size:]
        except (RuntimeError, MemoryError) as error:
            size = half_batch(min(size, len(rows)), error)
    return found


def half_batch(size: int, error: BaseException) -> int:
    """Half of a number of examples for which memory ran out. Re-raises other errors; `TargetError` for one example."""
    if not out_of_memory(error):
        raise error
    if size == 1:
        raise TargetError(
            "memory ran out for a batch of one example; train a smaller network, or on another --device"
        ) from error
    return size // 2
