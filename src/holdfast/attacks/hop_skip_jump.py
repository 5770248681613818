"""HopSkipJump: a label-based attack that estimates the normal of the decision boundary, steps along it, and returns to
the boundary by a binary search.

Chen, Jordan & Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", IEEE S&P 2020,
arXiv:1904.02144. Differs from the paper: a normal is estimated from points at a tenth of the distance, which is many
times farther, and for images half of their energy is in low frequencies; earlier normals are used with a decaying
weight; a step is evaluated at a point closer than the known one, and the boundary is searched from there; and the
nearest of several starts is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.boundaries import Decisions, normal
from holdfast.attacks.parts.losses import expect_norm
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, PerExample, Positive, Steps

_JUMPS = 6  # number of step sizes that are tried along one normal, each half the one before


@dataclass(frozen=True)
class HopSkipJump:
    """Estimates the gradient at the decision boundary from labels, steps along it, and searches for the boundary."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    draws: Steps = 20
    """number of points that are queried for the first normal; it grows with the square root of the number of
    the step"""
    radius: Positive = 0.1
    """distance of these points from the boundary, as a fraction of the distance to the clean input"""
    frequencies: Fraction = 0.5
    """fraction of an image's frequencies, lowest first, with half of the energy of each point; 1 for white noise"""
    memory: Fraction = 0.7
    """factor of the sum of earlier normals in each step"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return self.started(model, batch, threat, (), rng=rng)

    def started(
        self, model: Model, batch: Batch, threat: ThreatModel, starts: Sequence[Inputs], *, rng: Draws
    ) -> Inputs:
        """Return the perturbed inputs of a search that begins with the points in `starts`, each (n, *features)."""
        norm = expect_norm(threat.constraint, self, L2, Linf)
        queries = min(self.queries, threat.queries or self.queries)
        decisions = Decisions(model, batch, norm, queries, starts)
        normals = torch.zeros_like(batch.x)
        with torch.no_grad():
            for step, active in decisions.steps(rng):
                rows, (x, distance) = decisions.closest.rows(active), decisions.closest_points(active)
                root = (step + 1) ** 0.5
                radius, draws = self.radius * L2().distance(x, active.x), int(self.draws * root)
                estimate = normal(decisions, active, x, radius, draws, rng.at(step), share=self.frequencies)
                normals[rows] = L2().steepest(self.memory * normals[rows] + estimate, x, model.bounds)
                _jump(decisions, active, x, norm.steepest(normals[rows], x, model.bounds), distance / root)
        return decisions.result()


def _jump(decisions: Decisions, active: Batch, x: Inputs, normal: Inputs, size: PerExample) -> None:
    """Step `size` along the normal, halved until it gives a closer broken point; then search for the boundary."""
    points, radius, rows = x.clone(), torch.zeros_like(size), torch.arange(len(active), device=x.device)
    for _ in range(_JUMPS):
        candidates = torch.addcmul(x[rows], spread(size[rows], x), normal[rows])
        broken, distances = decisions.nearer(active.take(rows), candidates)
        points[rows[broken]], radius[rows[broken]] = candidates[broken], distances[broken]
        rows, size = rows[~broken], size / 2
        if not len(rows):
            break
    decisions.search(active, points, radius)
