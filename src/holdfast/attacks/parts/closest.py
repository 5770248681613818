"""Record of the closest broken point that a minimum-norm attack has found for each example of a batch."""

import torch

from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.logit_scale import scale
from holdfast.core.lookup import Lookup
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows


def leeway(logits: Logits) -> PerExample:
    """Return a tolerance for margins: below minus this value, a margin is negative for every batch size despite
    rounding. It is about 1e-5 of the largest logit in float32.
    """
    return 100 * torch.finfo(logits.dtype).eps * scale(logits)


def firmly_broken(logits: Logits, batch: Batch) -> Mask:
    """Return a mask of the examples that the model misclassifies by more than rounding. NaN counts as broken."""
    return ~(margin(logits, batch) > -leeway(logits))


class Closest:
    """Closest broken point that an attack has found for each example, with its distance. Without a broken point it is
    the clean input at an infinite distance.
    """

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """closest broken point of each example"""
        self.distance: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """distance of the closest broken point from the clean input"""

    @property
    def found(self) -> Mask:
        """Mask of the examples for which a broken point was found."""
        return self.distance < torch.inf

    def rows(self, subset: Batch) -> Rows:
        """Return the positions in the whole batch of the examples of `subset`, which is a part of it."""
        return self._lookup.rows(subset.ids)

    def take(self, subset: Batch) -> "Closest":
        """Return a new record that contains only the closest broken points of the examples of `subset`."""
        rows, record = self.rows(subset), Closest(subset)
        record.x, record.distance = self.x[rows], self.distance[rows]
        return record

    def unsolved(self, subset: Batch, eps: float) -> Mask:
        """Return a mask of the examples of `subset` that an attack must still try, because it has found no broken point
        within eps.

        With infinite eps, return whether its clean input is not misclassified, that is whether a closer point may
        exist.
        """
        return self.distance[self.rows(subset)] > (eps if eps < torch.inf else 0.0)

    def offer(self, subset: Batch, x: Inputs, distance: PerExample, broken: Mask) -> Mask:
        """Store the broken points among `x` that are closer to their clean inputs than the stored ones, and return a
        mask of the examples with a new closest point.
        """
        rows = slice(None) if subset.ids is self._ids else self.rows(subset)
        closer = broken & (distance < self.distance[rows])
        new = closer.nonzero()[:, 0]  # usually few: faster than torch.where over all inputs
        targets = new if isinstance(rows, slice) else rows[new]
        self.x[targets], self.distance[targets] = x[new], distance[new]
        return closer
