"""Store of the lowest margin of each example of a batch over all evaluated points, and of the point with that
margin.
"""

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.per_example import pick
from holdfast.core.types import Inputs, Mask, PerExample, Rows


class Best:
    """The best point of each example over all restarts, that is the one with the lowest margin, and which examples
    survive.
    """

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """best point of each example; the clean input until a point with a lower margin is offered"""
        self.margin: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """margin of the best point; positive while the example survives"""

    @property
    def standing(self) -> Rows:
        """Positions of the examples that are not broken."""
        return (self.margin > 0).nonzero()[:, 0]

    def rows(self, some: Batch) -> Rows:
        """Return the positions of the examples of `some` in the whole batch."""
        return self._lookup.rows(some.ids)

    def offer(self, some: Batch, x: Inputs, margin: PerExample) -> Mask:
        """Store the points of `some` whose margins are lower than the best ones (NaN is lowest); return which points
        are stored.
        """
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
