"""Boundary Attack: a random walk along the decision boundary towards the clean input.

Brendel, Rauber & Bethge, "Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning
Models", ICLR 2018, arXiv:1712.04248. Differs from the paper: half of each step's energy is in low frequencies for
images; step sizes are adapted after every query, so that half of the steps on the sphere and a quarter of those inwards
succeed, and not after windows of queries; and the nearest of several starts is used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.boundaries import Decisions
from holdfast.attacks.parts.losses import expect_norm
from holdfast.attacks.parts.random_search import ray_and_orthogonal
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Mask, PerExample, Positive, Steps


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
            for step, active in decisions.steps(rng):
                rows = decisions.closest.rows(active)
                x = walk[rows] if step else decisions.closest_points(active)[0]
                sphere = _around(active, x, model, around[rows], rng.at(step), self.frequencies)
                sphere_broken = decisions.ask(active, sphere)
                inner = sphere + spread(inwards[rows], x) * (active.x - sphere)
                inner_broken = decisions.ask(active, inner, sphere_broken)
                x = torch.where(spread(sphere_broken, x), sphere, x)
                walk[rows] = torch.where(spread(inner_broken, x), inner, x)
                around[rows] *= self._factor(sphere_broken, 1)
                inwards[rows] *= torch.where(sphere_broken, self._factor(inner_broken, 3), 1)
        return decisions.result()

    def _factor(self, success: Mask, failures_per_success: int) -> PerExample:
        """Factor of a step size that keeps it constant if one step in `1 + odds` succeeds."""
        return self.adaptation ** torch.where(success, 1.0, -1 / failures_per_success)


def _around(active: Batch, x: Inputs, model: Model, size: PerExample, rng: Draws, share: float) -> Inputs:
    """`x` moved in a random direction by a share of its distance, and back onto the sphere."""
    ray, beside = ray_and_orthogonal(active, x, model.bounds, rng, share=share)
    # shortened, so that the sum of both orthogonal parts ends on the sphere
    radius = L2().distance(x, active.x) / (1 + size**2).sqrt()
    return model.bounds.clamp(active.x + spread(radius, x) * (ray + spread(size, x) * beside))
