"""Sparse-RS: a score-based attack under L0, which chooses the few values or pixels to change by random search.

Croce, Andriushchenko, Singh, Flammarion & Hein, "Sparse-RS: a versatile framework for query-efficient sparse black-box
adversarial attacks", AAAI 2022, arXiv:2006.12834. Differs from the paper: each example exchanges its own positions; a
new colour always differs from the clean one, however many positions are exchanged; and targeted attacks use the margin
too.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import Best, expect_eps, expect_norm, margin
from holdfast.attacks.parts.random_search import distinct_positions
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Mask, Steps

_BLOCK = 64  # steps whose random numbers are drawn at once, which is faster for small batches
_FALLS = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 steps: after each the share falls to the
_PARTS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)  # corresponding fraction of alpha_init


@dataclass(frozen=True)
class SparseRS:
    """Searches at random for the few values or pixels whose change lowers the margin most, from scores alone."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    alpha_init: Fraction = 0.3
    """fraction of the changed positions that is exchanged in the first step; it falls over the number of queries"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm, best = expect_norm(expect_eps(threat.constraint, self), self, L0), Best(batch)
        assert isinstance(norm, L0)
        if len(batch) and norm.eps >= 1:
            with torch.no_grad():
                self._search(model, batch, norm, best, min(self.queries, threat.queries or self.queries), rng)
        return best.x

    def _search(self, model: Model, remaining: Batch, norm: L0, best: Best, queries: int, rng: Draws) -> None:
        positions = _Positions(remaining, norm, model.bounds, rng.at("start"))
        lowest = margin(model(positions.x.clone(), remaining.ids), remaining)  # `keep` changes `x` in place
        for step in range(1, queries + 1):
            if not float(lowest.min()) > 0:  # also true if one of them is NaN
                best.offer(remaining, positions.x, lowest)
                surviving = lowest > 0
                remaining, lowest = remaining.take(surviving), lowest[surviving]
                if not len(remaining):
                    return
                positions.take(surviving)
            if step == queries:
                break
            block, at = divmod(step - 1, _BLOCK)
            share = self.alpha_init / _PARTS[bisect_left(_FALLS, step * 10_000 // queries)]
            if at == 0:
                positions.plan(rng.at("block", block), share)
            margins = margin(model(positions.propose(at, share), remaining.ids), remaining)
            lower = ~(margins >= lowest)
            positions.keep(lower)
            lowest = torch.where(lower, margins, lowest)
        best.offer(remaining, positions.x, lowest)


class _Positions:
    """An order of the positions, of which the first `k` are changed, and the best point of each example."""

    def __init__(self, batch: Batch, norm: L0, bounds: Bounds, rng: Draws) -> None:
        self._channels = norm.grouped(batch.x).shape[2]
        self._clean = self._by_position(batch.x)
        low, high = (self._by_position(side.expand_as(batch.x)) for side in bounds.like(batch.x))
        self._sides = torch.cat((low, high), dim=2)
        units = self._clean.shape[2]
        self._k = int(min(norm.eps, units))
        self._ids, self._shape = batch.ids, batch.x.shape[1:]
        self._order = rng.at("place").uniform(batch.ids, units).argsort(1)
        first = self._order[:, None, : self._k].expand(-1, self._channels, -1)
        up = rng.at("colour").uniform(batch.ids, self._channels, self._k) < 0.5
        self._best = self._clean.scatter(2, first, self._colours(first, up))

    @property
    def x(self) -> Inputs:
        """Best point of each example so far, which is the one with the lowest margin."""
        return self._best.view(-1, *self._shape)

    def plan(self, rng: Draws, share: float) -> None:
        """Sample the random numbers for a block of search steps, each of which exchanges at most the fraction `share`
        of the changed positions.
        """
        n = self._exchanged(share)
        self._draws = rng.uniform(self._ids, _BLOCK, 2 * (n + 1) + n * self._channels)

    def propose(self, step: int, share: float) -> Inputs:
        """Return the next point to query for each example: some changed positions get their clean values back, and as
        many others get an extreme colour.
        """
        n, n_unchanged = self._exchanged(share), self._order.shape[1] - self._k
        draws = self._draws[:, step]
        self._out = distinct_positions(draws[:, : n + 1], self._k)
        self._in = (
            self._k + distinct_positions(draws[:, n + 1 : 2 * n + 2], n_unchanged)
            if n_unchanged
            else self._out
        )
        old, new = (
            self._order.gather(1, at)[:, None].expand(-1, self._channels, -1) for at in (self._out, self._in)
        )
        up = draws[:, 2 * n + 2 :][:, : n * self._channels].reshape(-1, self._channels, n) < 0.5
        restored = self._best.scatter(2, old, self._clean.gather(2, old))
        self._candidate = restored.scatter_(2, new, self._colours(new, up))
        return self._candidate.view(-1, *self._shape)

    def keep(self, better: Mask) -> None:
        """Make the last queried point the best point of each example for which `better` is true."""
        rows = better.nonzero()[:, 0]
        self._best[rows] = self._candidate[rows]
        out, into, order = self._out[rows], self._in[rows], self._order[rows]
        swapped = order.scatter(1, out, order.gather(1, into)).scatter_(1, into, order.gather(1, out))
        self._order[rows] = swapped

    def take(self, rows: Mask) -> None:
        """Restrict the state of the search to the examples of the mask `rows`, because the others are no longer
        attacked.
        """
        for name, value in vars(self).items():
            if isinstance(value, Tensor):  # one entry for each example
                setattr(self, name, value[rows])

    def _exchanged(self, share: float) -> int:
        return min(max(int(share * self._k), 1), self._order.shape[1] - self._k or 1)

    def _by_position(self, x: Inputs) -> Tensor:
        """Inputs as (n, values of a position, positions)."""
        return x.reshape(len(x), self._channels, -1)

    def _colours(self, at: Tensor, up: Tensor) -> Tensor:
        """Corners of the box; the opposite corner if the chosen one equals the clean value in every channel."""
        units, clean = self._clean.shape[2], self._clean.gather(2, at)
        is_clean = (self._sides.gather(2, at + up * units) == clean).all(1, keepdim=True)
        return self._sides.gather(2, at + (up ^ is_clean) * units)
