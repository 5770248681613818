"""Record of the lowest margin that an attack has found for each example of a batch, and of the point with this
margin.
"""

import torch

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.per_example import pick
from holdfast.core.types import Inputs, Mask, PerExample, Rows


class Best:
    """Best point that an attack has found for each example over all restarts, which is the point with the lowest
    margin.
    """

    def __init__(self, batch: Batch) -> None:
        self._ids = batch.ids
        self._lookup = Lookup(batch.ids)
        self.x: Inputs = batch.x.clone()
        """best point of each example; the clean input until a point with a lower margin is offered"""
        self.margin: PerExample = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        """margin of the best point; positive while the example survives"""

    @property
    def surviving(self) -> Rows:
        """Positions of the examples that the attack has not broken so far."""
        return (self.margin > 0).nonzero()[:, 0]

    def rows(self, subset: Batch) -> Rows:
        """Return the positions in the whole batch of the examples of `subset`, which is a part of it."""
        return self._lookup.rows(subset.ids)

    def offer(self, subset: Batch, x: Inputs, margin: PerExample) -> Mask:
        """Store those points `x` of the examples `subset` whose margin is lower than that of the best point so far (NaN
        is lowest), and return a mask of the stored points.
        """
        # a full batch, as at the start of most attacks, needs no lookup of rows
        if subset.ids is self._ids:
            lower = ~(margin >= self.margin)
            self.x = pick(lower, x, self.x)
            # NaN counts as broken; as minus infinity it can be compared
            self.margin = torch.where(lower, margin, self.margin).nan_to_num_(
                -torch.inf, torch.inf, -torch.inf
            )
            return lower
        rows = self._lookup.rows(subset.ids)
        lower = ~(margin >= self.margin[rows])
        self.x[rows[lower]] = x[lower]
        self.margin[rows[lower]] = margin[lower].nan_to_num(-torch.inf, torch.inf, -torch.inf)
        return lower
