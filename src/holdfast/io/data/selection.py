"""Selects examples of an opened data set: the first ones, or a random sample that depends on a seed."""

from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.io.data.arrays import selected_rows


@dataclass(frozen=True)
class Selection:
    """A data set of selected rows of another data set, in ascending order. The examples keep their ids."""

    whole: Data
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the original data set, which is shown in reports."""
        return self.whole.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes of the data set, or None if they are unknown."""
        return self.whole.classes

    @property
    def features(self) -> tuple[str, ...] | None:
        """Names of the feature columns if the data set is a table, else None."""
        features: tuple[str, ...] | None = getattr(self.whole, "features", None)
        return features

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the digest of the original data set and of the selected row numbers."""
        return digest(canonical([self.whole.digest, self.rows]))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> Batch:
        """Return the examples from `start` to `stop` - 1 of the selection as a batch. Consecutive rows are read at
        once.
        """
        rows = self.rows[start:stop]
        if rows and rows[-1] - rows[0] == len(rows) - 1:
            return self.whole.read(rows[0], rows[-1] + 1)
        return concatenated([self.whole.read(row, row + 1) for row in rows])


def selected(data: Data, *, n: int | None, sample: int | None, seed: int) -> Data:
    """Return a data set with the first `n` examples of `data`, a random sample determined by `seed`, or all of them."""
    if n is None and sample is None:
        return data
    rows = selected_rows(len(data), n=n, sample=sample, seed=seed, name=data.name)
    return data if len(rows) == len(data) else Selection(data, tuple(rows.tolist()))


def concatenated(batches: list[Batch]) -> Batch:
    """Return one batch that contains the examples of several batches."""
    return Batch(
        torch.cat([batch.x for batch in batches]),
        torch.cat([batch.y for batch in batches]),
        torch.cat([batch.ids for batch in batches]),
    )
