"""GeoDA: a label-based attack that assumes a nearly flat decision boundary, estimates its normal, and searches along
the normal from the clean input.

Rahmati, Moosavi-Dezfooli, Frossard & Dai, "GeoDA: a geometric framework for black-box adversarial attacks", CVPR 2020,
arXiv:2003.06468. Differs from the paper: the mean label is subtracted; the number of samples grows by the same factor
for every budget; if a direction gives no closer point, its normal is still added to the sum; and the nearest of several
starts is used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.boundaries import Decisions, normal
from holdfast.attacks.parts.losses import expect_norm, farthest
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps


@dataclass(frozen=True)
class GeoDA:
    """Estimates the normal of a nearly flat decision boundary from labels, and searches the boundary along it."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    draws: Steps = 30
    """number of points that are queried for the first normal"""
    growth: Positive = 1.4
    """growth factor of the number of points from one normal to the next; 0.6 to the power of -2/3, as in the paper"""
    radius: Positive = 0.1
    """distance of these points from the boundary, as a fraction of the distance to the clean input"""
    frequencies: Fraction = 0.5
    """fraction of an image's frequencies, lowest first, with half of the energy of each point; 1 for white noise"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2, Linf)
        queries = min(self.queries, threat.queries or self.queries)
        decisions = Decisions(model, batch, norm, queries)
        normals, limit = torch.zeros_like(batch.x), farthest(norm, batch.x, model.bounds)
        with torch.no_grad():
            for step, active in decisions.steps(rng):
                rows, (x, _) = decisions.closest.rows(active), decisions.closest_points(active)
                radius, draws = self.radius * L2().distance(x, active.x), self.draws * self.growth**step
                estimate = normal(
                    decisions,
                    active,
                    x,
                    radius,
                    int(min(draws, queries)),
                    rng.at(step),
                    share=self.frequencies,
                )
                normals[rows] += estimate
                direction = norm.steepest(normals[rows], x, model.bounds)
                decisions.improve(active, active.x + spread(limit[rows], x) * direction)
        return decisions.result()
