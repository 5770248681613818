"""ZOO (zeroth-order optimisation): the attack of Carlini and Wagner with gradients estimated from scores, one
coordinate at a time. It is slow, and is included for comparison.

Chen, Zhang, Sharma, Yi & Hsieh, "ZOO: zeroth order optimization based black-box attacks to deep neural networks without
training substitute models", AISec 2017, arXiv:1708.03999. Differs from the paper: coordinates are sampled uniformly,
without a hierarchy of smaller images; the weight of the margin starts at 10; it ends with a bisection to the boundary;
and an example is dropped once it is broken inside a finite eps. With the thousands of queries that are usual today few
coordinates move at all; it is included for comparison with older results.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import Closest, expect_norm, firmly_broken
from holdfast.attacks.parts.random_search import distinct_positions
from holdfast.attacks.parts.substitutes import coordinate_slopes
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, PerExample, Positive, Rows, Steps

_H = 1e-4  # the paper's step to either side, in widths of the box
_PRICE, _GROWTH = 10.0, 10.0  # first weight of the margin, and its factor while no search broke the example
_CLOSING = 10  # forwards of the final bisection, if the smallest change is searched


@dataclass(frozen=True)
class ZOO:
    """Minimises the objective of Carlini & Wagner by coordinate descent with finite differences of the scores."""

    queries: Steps = 20_000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    searches: Steps = 2
    """number of weights of the margin that are tried in turn"""
    coordinates: Steps = 128
    """number of coordinates of one step; each needs two queries"""
    lr: Positive = 0.1
    """approximate change of a coordinate in one step, as a fraction of the width of the box"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm, closest = expect_norm(threat.constraint, self, L2), Closest(batch)
        queries, remaining = min(self.queries, threat.queries or self.queries), batch
        bisects = norm.eps == torch.inf and queries > _CLOSING
        queries -= _CLOSING * bisects
        searches = min(self.searches, queries)
        price, low = (torch.full_like(closest.distance, value) for value in (_PRICE, 0.0))
        high = torch.full_like(price, torch.inf)
        with torch.no_grad():
            for k in range(searches if len(batch) else 0):
                solved = self._descend(
                    model, remaining, norm, price, closest, queries // searches, rng.at("search", k)
                )
                low, high = torch.where(solved, low, price), torch.where(solved, price, high)
                price = torch.where(high < torch.inf, (low + high) / 2, _GROWTH * price)
                active = (closest.distance[closest.rows(remaining)] > _sufficient_distance(norm)).nonzero()[
                    :, 0
                ]
                remaining, price, low, high = remaining.take(active), price[active], low[active], high[active]
                if not len(remaining):
                    break
        if bisects:
            return to_boundary(model, batch, closest.x, norm)
        return norm.project(closest.x, batch.x, model.bounds)

    def _descend(
        self, model: Model, batch: Batch, norm: Norm, price: PerExample, closest: Closest, queries: int, rng: Draws
    ) -> Mask:  # fmt: skip
        """One run from the clean input with a weight; returns for which examples it was large enough."""
        remaining, adam, step = batch, _Adam(batch), 0
        solved, rows = (
            torch.zeros_like(price, dtype=torch.bool),
            torch.arange(len(batch), device=price.device),
        )
        while queries and len(remaining):
            logits = model(adam.x, remaining.ids)
            broken, distance = firmly_broken(logits, remaining), norm.distance(adam.x, remaining.x)
            closest.offer(remaining, adam.x, distance, broken)
            solved[rows] |= broken
            n = min(self.coordinates, remaining.x[0].numel(), (queries - 1) // 2)
            queries -= 1 + 2 * n
            if not n:
                break
            at = distinct_positions(
                rng.at("step", step).uniform(remaining.ids, n + 1), remaining.x[0].numel()
            )
            slopes = coordinate_slopes(model, remaining, adam.x, at, norm, closest, _H * model.bounds.width)
            delta = (adam.x - remaining.x).flatten(1).gather(1, at)
            objective_grad = 2 * delta + (price[rows] * ~broken)[:, None] * slopes
            adam.step(at, objective_grad, self.lr * model.bounds.width)
            adam.x = model.bounds.clamp(adam.x)
            active = (closest.distance[closest.rows(remaining)] > _sufficient_distance(norm)).nonzero()[:, 0]
            if len(active) < len(remaining):
                remaining, rows = remaining.take(active), rows[active]
                adam.take(active)
            step += 1
        return solved


class _Adam:
    """Adam with a separate step count for each coordinate."""

    def __init__(self, batch: Batch) -> None:
        self.x, flat = batch.x, batch.x.flatten(1)
        self._mean, self._square, self._count = (torch.zeros_like(flat) for _ in range(3))

    def step(self, at: Tensor, derivatives: Tensor, lr: float) -> None:
        """Move the coordinates `at` (n, k) of each input by one step of Adam against their estimated derivatives."""
        mean = 0.9 * self._mean.gather(1, at) + 0.1 * derivatives
        square = 0.999 * self._square.gather(1, at) + 0.001 * derivatives**2
        count = self._count.gather(1, at) + 1
        for state, new in ((self._mean, mean), (self._square, square), (self._count, count)):
            state.scatter_(1, at, new)
        size = (square / (1 - 0.999**count)).sqrt().clamp_min(torch.finfo(square.dtype).tiny)
        self.x = self.x.flatten(1).scatter_add(1, at, -lr * mean / (1 - 0.9**count) / size).view_as(self.x)

    def take(self, rows: Rows) -> None:
        """Restrict the state of the optimiser to the examples at the positions `rows`, because the others are no longer
        attacked.
        """
        self.x, self._mean, self._square, self._count = (
            value[rows] for value in (self.x, self._mean, self._square, self._count)
        )


def _sufficient_distance(norm: Norm) -> float:
    return norm.eps if norm.eps < torch.inf else 0.0
