"""RayS: a label-based attack that searches for the direction of signs (-1 or 1 for each value) along which the decision
boundary is nearest.

Chen & Gu, "RayS: a ray searching method for hard-label adversarial attack", KDD 2020, arXiv:2006.12792. Differs from
the paper: until a point is broken, rays are tried at the corners of the box, and after blocks of a sixteenth new random
signs are used; the search along a ray first doubles its steps down from the known radius, because most flips gain
little, and ends at a fraction of the radius; after single features the blocks start again with the whole input; and an
example is dropped once it is broken inside a finite eps.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.losses import Closest, expect_norm, firmly_broken
from holdfast.attacks.parts.random_search import waves
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, Positive, Rows, Steps

_COARSE = 16  # most blocks of flips while nothing is broken; finer ones give similar corners
_SLOW = 0.15  # share of an image's lowest frequencies that new random signs are made of


@dataclass(frozen=True)
class RayS:
    """Searches for the direction of signs along which the decision boundary is nearest, from labels alone."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    precision: Positive = 0.001
    """precision of the search along a ray, as a fraction of the radius"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm, closest = expect_norm(threat.constraint, self, Linf), Closest(batch)
        remaining, rays, x = batch, _Rays(batch, model.bounds, self.precision, rng), batch.x
        with torch.no_grad():
            for query in range(min(self.queries, threat.queries or self.queries)):
                if not len(remaining):
                    break
                broken = firmly_broken(model(x, remaining.ids), remaining)
                closest.offer(remaining, x, norm.distance(x, remaining.x), broken)
                if query:
                    rays.update(broken)
                active = closest.unsolved(remaining, norm.eps)
                if not active.all():
                    remaining = remaining.take(active)
                    rays.take(active)
                x = rays.points(remaining.x)
        return norm.project(closest.x, batch.x, model.bounds)


class _Rays:
    """The best ray of each example and the one under test, with radii at which it does and does not break the model."""

    def __init__(self, batch: Batch, bounds: Bounds, precision: float, rng: Draws) -> None:
        self._bounds, self._precision = bounds, precision
        self._rng, self._ids, self._shape, self._n_draws = rng, batch.ids, batch.x.shape[1:], 0
        self._best = torch.ones_like(batch.x).flatten(1)
        self._radius = torch.full_like(batch.x.flatten(1)[:, 0], torch.inf)
        self._trial = self._best.clone()
        self._probe = torch.full_like(self._radius, bounds.width)
        self._low, self._high = torch.zeros_like(self._radius), self._radius.clone()
        self._stride = self._probe / 2
        self._blocks, self._block = torch.ones_like(batch.ids), torch.full_like(batch.ids, -1)

    def take(self, rows: Mask) -> None:
        """Restrict the state of the search to the examples of the mask `rows`, because the others are no longer
        attacked.
        """
        for name, value in vars(self).items():
            if isinstance(value, Tensor):  # one entry for each example
                setattr(self, name, value[rows])

    def points(self, clean: Inputs) -> Inputs:
        """Return the next point to query for each example, on the ray from its clean input that is being searched."""
        return self._bounds.clamp(
            torch.addcmul(clean, spread(self._probe, clean), self._trial.view_as(clean))
        )

    def update(self, broken: Mask) -> None:
        """Update the search with the results of the last queries: each example continues on its ray, or goes to the
        next ray.
        """
        searching = self._high < torch.inf
        self._low = torch.where(searching & ~broken, self._probe, self._low)
        self._high = torch.where(broken, self._probe, self._high)
        finished = (self._high < torch.inf) & (self._high - self._low <= self._precision * self._high)
        self._best[finished] = self._trial[finished]
        self._radius = torch.where(finished, self._high, self._radius)
        doubled = torch.maximum(self._high - self._stride, self._high / 2)
        self._probe = torch.where(self._low > 0, (self._low + self._high) / 2, doubled)
        self._stride = 2 * self._stride
        self._next_ray((finished | ~(searching | broken)).nonzero()[:, 0])

    def _next_ray(self, rows: Rows) -> None:
        """Test the best ray with the next block flipped, at the radius at which the best one breaks the model."""
        features = self._best.shape[1]
        blocks, block = self._blocks[rows], self._block[rows] + 1
        size = -(-features // blocks)
        finer, unknown = block * size >= features, self._radius[rows] == torch.inf
        finest = finer & (blocks >= torch.where(unknown, min(_COARSE, features), features))
        blocks = torch.where(finest, 1, torch.where(finer, 2 * blocks, blocks))
        block = torch.where(finer, 0, block)
        self._draw(rows[finest & unknown])
        self._blocks[rows], self._block[rows] = blocks, block
        size = -(-features // blocks)
        begin, feature = (block * size)[:, None], torch.arange(features, device=rows.device)
        flipped, best = (feature >= begin) & (feature < begin + size[:, None]), self._best[rows]
        self._trial[rows] = torch.where(flipped, -best, best)
        radius, width = self._radius[rows], self._bounds.width
        self._probe[rows] = torch.where(radius < torch.inf, radius, width)
        self._stride[rows] = torch.where(radius < torch.inf, self._precision * radius, width / 2)
        self._low[rows], self._high[rows] = 0.0, torch.inf

    def _draw(self, rows: Rows) -> None:
        """New random signs for unbroken examples, which all have the same ray; for images from low frequencies."""
        if len(rows):
            self._n_draws += 1
            slow = waves(
                self._rng.at("anew", self._n_draws), self._ids[rows], 1, self._shape, _SLOW, self._best.dtype
            )
            self._best[rows] = torch.where(slow >= 0, 1.0, -1.0).to(slow).flatten(1)
