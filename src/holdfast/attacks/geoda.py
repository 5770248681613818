"""GeoDA: take the boundary for flat, estimate its normal from labels, and leave the clean input along it.

Rahmati, Moosavi-Dezfooli, Frossard & Dai, "GeoDA: a geometric framework for black-box adversarial attacks", CVPR 2020,
arXiv:2003.06468. Differs from the paper: the mean answer is taken off the others, the number of draws grows by the
same factor whatever the budget, a way that does not lead nearer only adds to the sum of normals, and the nearest of
several starts is taken.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps
from holdfast.ops.decisions import Decisions
from holdfast.ops.normals import normal
from holdfast.ops.norms import expect_norm, farthest


@dataclass(frozen=True)
class GeoDA:
    """Sum up the boundary's normals, estimated from labels, and go along the sum to the boundary."""

    queries: Steps = 5000
    """forwards for each example, at most; the threat model's budget where that is less"""
    draws: Steps = 30
    """points asked about for the first normal"""
    growth: Positive = 1.4
    """factor from the draws of one normal to those of the next: 0.6 to the power of -2/3, as in the paper"""
    radius: Positive = 0.1
    """how far from the boundary they lie, as a share of the distance to the clean input"""
    frequencies: Fraction = 0.5
    """share of an image's frequencies, lowest first, that half of each draw is made of; 1 is noise alone"""

    needs: ClassVar[Access] = "labels"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2, Linf)
        queries = min(self.queries, threat.queries or self.queries)
        decisions = Decisions(model, batch, norm, queries)
        normals, far = torch.zeros_like(batch.x), farthest(norm, batch.x, model.bounds)
        with torch.no_grad():
            for step, some in decisions.steps(rng):
                rows, (x, _) = decisions.closest.rows(some), decisions.known(some)
                radius, draws = self.radius * L2().distance(x, some.x), self.draws * self.growth**step
                fresh = normal(
                    decisions, some, x, radius, int(min(draws, queries)), rng.at(step), share=self.frequencies
                )
                normals[rows] += fresh
                away = norm.steepest(normals[rows], x, model.bounds)
                decisions.improve(some, some.x + spread(far[rows], x) * away)
        return decisions.found()
