"""Queries of a model by an attack with a limited number of passes. Every answer counts as a result of the attack."""

import torch

from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Norm, allowed
from holdfast.core.model import Model
from holdfast.core.types import Inputs, Logits, Mask, PerExample

DOUBLE_CHECKS = 4
"""number of further queries of a point that breaks a randomised model; the median margin counts"""


class CountedQueries:
    """Model with a number of passes that are left for each example, and the best points of all queries."""

    def __init__(self, model: Model, batch: Batch, constraint: Norm, passes: int) -> None:
        self.model, self.constraint, self.passes_left = model, constraint, passes
        self.best = Best(batch)
        self.randomised = False
        self._batch = batch

    def surviving(self) -> Batch:
        """Return the examples that no query has broken so far."""
        return self._batch.take(self.best.surviving)

    def begin(self) -> Logits:
        """Query the clean inputs twice, which shows whether the model is randomised, and return their logits."""
        first, second = (self.logits(self._batch, self._batch.x) for _ in range(2))
        self.randomised = not torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)
        return second

    def logits(self, batch: Batch, x: Inputs) -> Logits:
        """Return the logits of points `x` of the examples `batch`, from one pass."""
        self.passes_left -= 1
        with torch.no_grad():
            logits = self.model(x, batch.ids)
        self.offer(batch, x, logits)
        return logits

    def offer(self, batch: Batch, x: Inputs, logits: Logits) -> Mask:
        """Count queried points as results where they are in the constraint, and return a mask of the broken ones."""
        inside = allowed(self.constraint, x, batch.x, self.model.bounds)
        margins = margin(logits.detach(), batch)
        broken = inside & ~(margins > 0)
        if self.randomised and broken.any():
            margins = self._checked(batch, x, margins, broken)
        rows = inside.nonzero()[:, 0]
        self.best.offer(batch.take(rows), x.detach()[rows], margins[rows])
        return inside & ~(margins > 0)

    def _checked(self, batch: Batch, x: Inputs, margins: PerExample, broken: Mask) -> PerExample:
        rows = broken.nonzero()[:, 0]
        chosen, points = batch.take(rows), x.detach()[rows]
        self.passes_left -= DOUBLE_CHECKS
        with torch.no_grad():
            again = [margin(self.model(points, chosen.ids), chosen) for _ in range(DOUBLE_CHECKS)]
        margins = margins.clone()
        margins[rows] = torch.stack((margins[rows], *again)).median(0).values
        return margins
