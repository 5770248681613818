"""The closest point that broke each example of a batch, as minimum-norm attacks keep it."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.types import Inputs, Logits, Mask, PerExample, Rows
from holdfast.ops.logits import scale
from holdfast.ops.losses import margin


def leeway(logits: Logits) -> PerExample:
    """How far below zero a margin must be to stay there when another batch size rounds: 1e-5 logits in float32."""
    return 100 * torch.finfo(logits.dtype).eps * scale(logits)


def firmly_broken(logits: Logits, batch: Batch) -> Mask:
    """Whether the model gives in by more than rounding; a NaN is broken."""
    return ~(margin(logits, batch) > -leeway(logits))


class Closest:
    """Keeps each example's closest broken point; the clean input, at distance infinity, until there is one."""

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """the closest broken point of each example"""
        self.distance: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """how far away it is"""

    @property
    def found(self) -> Mask:
        """Which examples are broken."""
        return self.distance < torch.inf

    def rows(self, some: Batch) -> Rows:
        """Where `some` examples stand in the whole batch."""
        return self._lookup.rows(some.ids)

    def take(self, some: Batch) -> "Closest":
        """What is kept of `some` examples, on its own."""
        rows, own = self.rows(some), Closest(some)
        own.x, own.distance = self.x[rows], self.distance[rows]
        return own

    def far(self, some: Batch, eps: float) -> Mask:
        """Which of `some` examples are not broken inside a finite eps yet; without an eps, not where they are clean."""
        return self.distance[self.rows(some)] > (eps if eps < torch.inf else 0.0)

    def offer(self, some: Batch, x: Inputs, distance: PerExample, broken: Mask) -> Mask:
        """Take the broken points that are closer than what is known; who got closer."""
        rows = slice(None) if some.ids is self._ids else self.rows(some)
        closer = broken & (distance < self.distance[rows])
        theirs = closer.nonzero()[:, 0]  # mostly a few: quicker than a choice for every number of every input
        at = theirs if isinstance(rows, slice) else rows[theirs]
        self.x[at], self.distance[at] = x[theirs], distance[theirs]
        return closer
