"""Operations between one value for each example and whole inputs, and missing values of inputs."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from holdfast.core.batch import Batch, Lookup
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits, Mask


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number or truth value for each example, so that it broadcasts with the inputs `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def pick(chosen: Mask, one: Inputs, other: Inputs) -> Inputs:
    """Return for each example the input of `one` if `chosen` is true, else that of `other`. The difference between both
    must be finite.

    It uses a weight of exactly 0 or 1, which is four times faster on a CPU than `torch.where` with a broadcast mask. A
    zero may lose its sign.
    """
    return torch.lerp(other, one, spread(chosen.to(one.dtype), one))


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
