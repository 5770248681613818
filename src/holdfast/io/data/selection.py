"""Selects examples of an opened data set: the first ones, or a random sample that depends on a seed."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.io.data.arrays import Arrays, first_rows_note, selected_rows
from holdfast.io.data.pictures import Pictures

if TYPE_CHECKING:
    from holdfast.io.data.example_groups import Groups


@dataclass(frozen=True)
class Selection:
    """A data set of selected rows of another data set, in ascending order. The examples keep their ids."""

    whole: Data
    rows: tuple[int, ...]
    own_groups: "Groups | None" = None
    """group of each selected example, if it is not that of the original data set"""
    own_notes: tuple[str, ...] = ()
    """notes on the selection for the report"""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the original data set and on the selection."""
        return (*getattr(self.whole, "notes", ()), *self.own_notes)

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
    def groups(self) -> "Groups | None":
        """Group of each selected example, or None if it is unknown."""
        groups: Groups | None = getattr(self.whole, "groups", None)
        return groups.taken(self.rows) if self.own_groups is None and groups is not None else self.own_groups

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
    if len(rows) == len(data):
        return data
    notes = first_rows_note(data.y, data.y[rows], n) if isinstance(data, Arrays) else ()
    return Selection(data, tuple(rows.tolist()), own_notes=notes)


def grouped(
    data: Data, groups: "Groups | None", *, whole: bool, positions: NDArray[np.int64] | None = None
) -> Data:
    """Return a data set whose examples have `groups`, which contain one for each example of its source, in the order of
    the source. If `groups` is None, the data set itself must state them.

    `whole` is True if all examples of the source are in the data set. `positions` are those of the examples in the
    source; None if the data set has them. Raises `UsageError` if the number of groups is wrong, or if they cannot be
    used.
    """
    own: Groups | None = getattr(data, "groups", None)
    if groups is not None:
        positions = _positions(data) if positions is None else positions
        n, is_whole = len(groups.places), whole and bool((positions == np.arange(len(data))).all())
        if n <= positions.max() or (is_whole and n != len(data)):
            raise UsageError(
                f"groups has {n} values, and the data have {'' if is_whole else 'at least '}{positions.max() + 1} "
                "examples; one value for each example was expected"
            )
        own = groups.taken(positions)
    if own is None:
        raise UsageError(
            f"{data.name} has no columns or arrays with names that could state the groups; in Python, groups may be an "
            "array with one value for each example",
            Remedy("groups"),
        )
    usable = own.refuse_unusable()
    if isinstance(data, Arrays | Pictures):
        return replace(data, groups=usable)
    return Selection(data, tuple(range(len(data))), usable)


def _positions(data: Data) -> NDArray[np.int64]:
    """Return the positions of the examples of a data set in its source."""
    if isinstance(data, Selection):
        return _positions(data.whole)[list(data.rows)]
    return data.ids if isinstance(data, Arrays | Pictures) else np.arange(len(data))


def concatenated(batches: list[Batch]) -> Batch:
    """Return one batch that contains the examples of several batches."""
    return Batch(
        torch.cat([batch.x for batch in batches]),
        torch.cat([batch.y for batch in batches]),
        torch.cat([batch.ids for batch in batches]),
    )
