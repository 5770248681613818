"""The inputs that the guard of a server has stored, for its operator: as an .npz file, and their number by client."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from holdfast.guard.stored_inputs import StoredInputs

MOST = 1000
"""largest number of inputs in one response"""


@dataclass(frozen=True)
class FlaggedInput:
    """An input on which a rule fired."""

    x: Tensor
    request: str
    row: int
    time_s: float
    scores: dict[str, float]


@dataclass(frozen=True)
class FlaggedInputs:
    """The stored inputs of a guard, and the range of their values."""

    stored: StoredInputs
    low: float = 0.0
    high: float = 1.0

    def newest(self, n: int) -> list[FlaggedInput]:
        """Return at most `n` stored inputs, the newest request first. Raises `TargetError` for a file that was
        changed.
        """
        return list(islice(self._all(), n))

    def npz(self, n: int) -> bytes:
        """Return at most `n` of them as an .npz file."""
        return _npz(self.newest(n))

    def by_principal(self) -> Counter[str]:
        """Return the number of stored requests of each client, by its pseudonym in the names of the files."""
        return self.stored.by_pseudonym()

    def _all(self) -> Iterator[FlaggedInput]:
        for each in self.stored.read(newest_first=True):
            for x, row, scores in zip(each.x, each.rows, each.scores, strict=True):
                yield FlaggedInput(x, each.request, row, each.time_s, scores)


def _npz(inputs: list[FlaggedInput]) -> bytes:
    """The inputs of the shape and type of the newest one as an .npz file, which needs no pickle to be read."""
    same = [i for i in inputs if (i.x.shape, i.x.dtype) == (inputs[0].x.shape, inputs[0].x.dtype)]
    x = torch.stack([i.x for i in same]) if same else torch.empty(0)
    file = io.BytesIO()
    np.savez(
        file,
        x=(x.float() if x.dtype is torch.bfloat16 else x).numpy(),
        request=np.array([i.request for i in same], dtype=np.str_),
        row=np.array([i.row for i in same], dtype=np.int64),
        time=np.array([i.time_s for i in same], dtype=np.float64),
    )
    return file.getvalue()
