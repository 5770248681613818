"""The lowest margin that each example of a batch was ever brought to, and the point where that was."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.per_example import pick
from holdfast.core.types import Inputs, Mask, PerExample, Rows


class Best:
    """Keeps each example's best point over restarts, and knows who still stands."""

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """the best point of each example; the clean one until something lower was offered"""
        self.margin: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """the margin there; positive while the example stands"""

    @property
    def standing(self) -> Rows:
        """Positions of the examples that nothing has broken yet."""
        return (self.margin > 0).nonzero()[:, 0]

    def rows(self, some: Batch) -> Rows:
        """Where `some` examples stand in the whole batch."""
        return self._lookup.rows(some.ids)

    def offer(self, some: Batch, x: Inputs, margin: PerExample) -> Mask:
        """Take the points of `some` examples that are lower than what is known (NaN is lowest); who got lower."""
        if some.ids is self._ids:
            lower = ~(margin >= self.margin)
            self.x = pick(lower, x, self.x)
            self.margin = torch.where(lower, margin, self.margin).nan_to_num_(
                -torch.inf, torch.inf, -torch.inf
            )
            return lower
        rows = self._lookup.rows(some.ids)
        lower = ~(margin >= self.margin[rows])
        self.x[rows[lower]] = x[lower]
        self.margin[rows[lower]] = margin[lower].nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return lower
