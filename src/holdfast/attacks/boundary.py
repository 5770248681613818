"""Boundary Attack: a random walk along the decision boundary towards the clean input.

Brendel, Rauber & Bethge, "Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning
Models", ICLR 2018, arXiv:1712.04248. Differs from the paper: half of each step's energy is in low frequencies for
images; step sizes are adapted after every query, so that half of the steps on the sphere and a quarter of those inwards
succeed, and not after windows of queries; and the nearest of several starts is used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Mask, PerExample, Positive, Steps
from holdfast.ops.decisions import Decisions
from holdfast.ops.directions import ray_and_orthogonal
from holdfast.ops.norms import expect_norm


@dataclass(frozen=True)
class Boundary:
    """Moves along the decision boundary towards the clean input in random steps, from labels alone."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    around: Positive = 0.1
    """length of the first step on the sphere, as a fraction of its radius"""
    inwards: Positive = 0.01
    """length of the first step towards the clean input, as a fraction of the distance to it"""
    adaptation: Positive = 1.2
    """factor of a step size after a success; after a failure the step size shrinks, so that half of the steps on the
    sphere and a quarter of the steps inwards succeed"""
    frequencies: Fraction = 0.5
    """fraction of an image's frequencies, lowest first, with half of the energy of each step; 1 for white noise"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        decisions = Decisions(model, batch, norm, min(self.queries, threat.queries or self.queries))
        around = torch.full_like(decisions.closest.distance, self.around)
        inwards = torch.full_like(around, self.inwards)
        walk = torch.full_like(batch.x, torch.nan)
        with torch.no_grad():
            for step, some in decisions.steps(rng):
                rows = decisions.closest.rows(some)
                x = walk[rows] if step else decisions.known(some)[0]
                sphere = _around(some, x, model, around[rows], rng.at(step), self.frequencies)
                stays = decisions.ask(some, sphere)
                near = sphere + spread(inwards[rows], x) * (some.x - sphere)
                comes = decisions.ask(some, near, stays)
                x = torch.where(spread(stays, x), sphere, x)
                walk[rows] = torch.where(spread(comes, x), near, x)
                around[rows] *= self._factor(stays, 1)
                inwards[rows] *= torch.where(stays, self._factor(comes, 3), 1)
        return decisions.found()

    def _factor(self, yes: Mask, odds: int) -> PerExample:
        """Factor of a step size that keeps it constant if one step in `1 + odds` succeeds."""
        return self.adaptation ** torch.where(yes, 1.0, -1 / odds)


def _around(some: Batch, x: Inputs, model: Model, size: PerExample, rng: Draws, share: float) -> Inputs:
    """`x` moved in a random direction by a share of its distance, and back onto the sphere."""
    ray, beside = ray_and_orthogonal(some, x, model.bounds, rng, share=share)
    radius = L2().distance(x, some.x) / (1 + size**2).sqrt()
    return model.bounds.clamp(some.x + spread(radius, x) * (ray + spread(size, x) * beside))
