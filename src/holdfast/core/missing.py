"""Missing values of inputs, which are NaN and stay missing: an attack gets numbers in their place, and whatever it
changes there, the model gets NaN.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits


def without_missing(batch: Batch, bounds: Bounds) -> Batch:
    """Return the batch with the middle of the valid range in place of missing values; it is the same batch if there are
    none.
    """
    if not batch.x.isnan().any():
        return batch
    low, high = bounds.like(batch.x)
    return batch.at(torch.where(batch.x.isnan(), (low + high) / 2, batch.x))


def with_missing(x_adv: Inputs, x: Inputs) -> Inputs:
    """Return attacked inputs `x_adv` in which the values that are missing in the clean inputs `x` are missing, too."""
    return torch.where(x.isnan(), x, x_adv)


@dataclass(frozen=True)
class WithMissing:
    """Wrapper of a model for attacks on a batch, with missing values in its inputs where the clean ones have some."""

    model: Model
    batch: Batch

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid input values of the model."""
        return self.model.bounds

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.batch.ids)

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the inputs `x`, which are the rows `ids` of the batch (all of them if None)."""
        clean = self.batch.x if ids is None else self.batch.x[self._lookup.rows(ids)]
        return self.model(with_missing(x, clean), ids)
