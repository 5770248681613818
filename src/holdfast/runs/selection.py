"""A part of a data set, for data that is opened already: the first of it, or a seeded sample."""

from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.sources.arrays import selected_rows


@dataclass(frozen=True)
class Selection:
    """Some rows of a data set, ascending; ids stay the source rows."""

    whole: Data
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.whole.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, where known."""
        return self.whole.classes

    @property
    def features(self) -> tuple[str, ...] | None:
        """Names of the columns of a table, where it is one."""
        found: tuple[str, ...] | None = getattr(self.whole, "features", None)
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the whole and of which rows were taken."""
        return digest(canonical([self.whole.digest, self.rows]))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop` of the selection; neighbours are read at once."""
        rows = self.rows[start:stop]
        if rows and rows[-1] - rows[0] == len(rows) - 1:
            return self.whole.read(rows[0], rows[-1] + 1)
        return gathered([self.whole.read(row, row + 1) for row in rows])


def selected(data: Data, *, n: int | None, sample: int | None, seed: int) -> Data:
    """The first `n` examples, a seeded sample, or all."""
    if n is None and sample is None:
        return data
    rows = selected_rows(len(data), n=n, sample=sample, seed=seed, name=data.name)
    return data if len(rows) == len(data) else Selection(data, tuple(rows.tolist()))


def gathered(batches: list[Batch]) -> Batch:
    """Batches as one."""
    return Batch(
        torch.cat([batch.x for batch in batches]),
        torch.cat([batch.y for batch in batches]),
        torch.cat([batch.ids for batch in batches]),
    )
