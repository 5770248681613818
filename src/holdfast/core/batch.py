"""Batches of examples with labels and ids, and the protocol of a data set from which they are read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from holdfast.core.types import Ids, Inputs, Labels

UNLABELLED = -1
"""label of a training example that has no label"""


@dataclass(frozen=True)
class Batch:
    """A batch of examples: inputs `x` (n, *features), labels `y` (n), and `ids` (n), which are the row numbers of the
    examples in their data set.

    `target` (n) is the class that a targeted attack must reach; None means that any wrong class counts. In training
    data a label may be `UNLABELLED`.
    """

    x: Inputs
    y: Labels
    ids: Ids
    target: Labels | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> "Batch":
        """Return a batch with some of the examples, chosen by their positions or by a boolean mask."""
        rows = (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows).to(self.x.device)
        target = None if self.target is None else self.target[rows]
        x = self.x.index_select(0, rows)  # three times as fast as `x[rows]` on a CPU
        return Batch(x, self.y[rows], self.ids[rows], target)

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
        target = None if self.target is None else self.target.to(device)
        return Batch(self.x.to(device), self.y.to(device), self.ids.to(device), target)

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield consecutive batches of at most `size` examples."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            target = None if self.target is None else self.target[rows]
            yield Batch(self.x[rows], self.y[rows], self.ids[rows], target)


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
