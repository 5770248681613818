"""Store of the closest broken point of each example of a batch, for minimum-norm attacks."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows
from holdfast.ops.logits import scale
from holdfast.ops.losses import margin


def leeway(logits: Logits) -> PerExample:
    """Return the amount below 0 at which a margin stays negative with other batch sizes, about 1e-5 of the largest
    logit in float32.
    """
    return 100 * torch.finfo(logits.dtype).eps * scale(logits)


def firmly_broken(logits: Logits, batch: Batch) -> Mask:
    """Return whether the model misclassifies each example by more than rounding; NaN counts as broken."""
    return ~(margin(logits, batch) > -leeway(logits))


class Closest:
    """The closest broken point of each example; the clean input at infinite distance if none was found."""

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """closest broken point of each example"""
        self.distance: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """distance of the closest broken point from the clean input"""

    @property
    def found(self) -> Mask:
        """Mask of the examples that are broken."""
        return self.distance < torch.inf

    def rows(self, some: Batch) -> Rows:
        """Return the positions of the examples of `some` in the whole batch."""
        return self._lookup.rows(some.ids)

    def take(self, some: Batch) -> "Closest":
        """Return a new `Closest` with the points of the examples of `some`."""
        rows, own = self.rows(some), Closest(some)
        own.x, own.distance = self.x[rows], self.distance[rows]
        return own

    def far(self, some: Batch, eps: float) -> Mask:
        """Return whether each example of `some` has no broken point within eps.

        With infinite eps, return whether its clean input is not misclassified, that is whether a closer point may
        exist.
        """
        return self.distance[self.rows(some)] > (eps if eps < torch.inf else 0.0)

    def offer(self, some: Batch, x: Inputs, distance: PerExample, broken: Mask) -> Mask:
        """Store the broken points that are closer than the known ones; return for which examples this was the case."""
        rows = slice(None) if some.ids is self._ids else self.rows(some)
        closer = broken & (distance < self.distance[rows])
        theirs = closer.nonzero()[:, 0]  # usually few: faster than torch.where over all inputs
        at = theirs if isinstance(rows, slice) else rows[theirs]
        self.x[at], self.distance[at] = x[theirs], distance[theirs]
        return closer
