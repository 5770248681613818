"""The closest broken point of each example of a batch, for minimum-norm attacks."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows
from holdfast.ops.logits import scale
from holdfast.ops.losses import margin


def leeway(logits: Logits) -> PerExample:
    """How far below 0 a margin stays negative with other batch sizes: about 1e-5 of the largest logit in float32."""
    return 100 * torch.finfo(logits.dtype).eps * scale(logits)


def firmly_broken(logits: Logits, batch: Batch) -> Mask:
    """Whether the model misclassifies by more than rounding; NaN counts as broken."""
    return ~(margin(logits, batch) > -leeway(logits))


class Closest:
    """Keeps the closest broken point of each example; the clean input at infinite distance while there is none."""

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """closest broken point of each example"""
        self.distance: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """its distance from the clean input"""

    @property
    def found(self) -> Mask:
        """Which examples are broken."""
        return self.distance < torch.inf

    def rows(self, some: Batch) -> Rows:
        """Positions of the examples of `some` in the whole batch."""
        return self._lookup.rows(some.ids)

    def take(self, some: Batch) -> "Closest":
        """A new `Closest` with the points of the examples of `some`."""
        rows, own = self.rows(some), Closest(some)
        own.x, own.distance = self.x[rows], self.distance[rows]
        return own

    def far(self, some: Batch, eps: float) -> Mask:
        """Whether each example of `some` is unbroken within eps; with infinite eps, whether it is not clean."""
        return self.distance[self.rows(some)] > (eps if eps < torch.inf else 0.0)

    def offer(self, some: Batch, x: Inputs, distance: PerExample, broken: Mask) -> Mask:
        """Keep the broken points that are closer than the known ones; return which examples got closer."""
        rows = slice(None) if some.ids is self._ids else self.rows(some)
        closer = broken & (distance < self.distance[rows])
        theirs = closer.nonzero()[:, 0]  # usually few: faster than torch.where over all inputs
        at = theirs if isinstance(rows, slice) else rows[theirs]
        self.x[at], self.distance[at] = x[theirs], distance[theirs]
        return closer
