"""HopSkipJump: estimate the boundary's normal from labels, jump along it, and come back to the boundary.

Chen, Jordan & Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", IEEE S&P 2020,
arXiv:1904.02144. Differs from the paper: a normal is estimated from points at a tenth of the distance, many times as
far out and half of low frequency where the inputs are images; earlier normals count with a weight that fades; a jump is
judged where it is nearer than what is known, and the boundary searched from there; and the nearest of several starts
is taken.
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
from holdfast.core.types import Access, Fraction, Inputs, PerExample, Positive, Steps
from holdfast.ops.decisions import Decisions
from holdfast.ops.normals import normal
from holdfast.ops.norms import expect_norm

_JUMPS = 6  # lengths tried along one normal, each half the one before


@dataclass(frozen=True)
class HopSkipJump:
    """Jump along the boundary's normal, estimated from labels, and look for the boundary on the way back."""

    queries: Steps = 5000
    """forwards for each example, at most; the threat model's budget where that is less"""
    draws: Steps = 20
    """points asked about for the first normal; they grow with the square root of the step"""
    radius: Positive = 0.1
    """how far from the boundary they lie, as a share of the distance to the clean input"""
    frequencies: Fraction = 0.5
    """share of an image's frequencies, lowest first, that half of each draw is made of; 1 is noise alone"""
    memory: Fraction = 0.7
    """weight that earlier normals keep from step to step"""

    needs: ClassVar[Access] = "labels"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2, Linf)
        decisions = Decisions(model, batch, norm, min(self.queries, threat.queries or self.queries))
        normals = torch.zeros_like(batch.x)
        with torch.no_grad():
            for step, some in decisions.steps(rng):
                rows, (x, distance) = decisions.closest.rows(some), decisions.known(some)
                root = (step + 1) ** 0.5
                radius, draws = self.radius * L2().distance(x, some.x), int(self.draws * root)
                fresh = normal(decisions, some, x, radius, draws, rng.at(step), share=self.frequencies)
                normals[rows] = L2().steepest(self.memory * normals[rows] + fresh, x, model.bounds)
                _jump(decisions, some, x, norm.steepest(normals[rows], x, model.bounds), distance / root)
        return decisions.found()


def _jump(decisions: Decisions, some: Batch, x: Inputs, normal: Inputs, size: PerExample) -> None:
    """Go `size` along the normal; half as far where that is not nearer, and so on; then back to the boundary."""
    far, radius, left = x.clone(), torch.zeros_like(size), torch.arange(len(some), device=x.device)
    for _ in range(_JUMPS):
        tried = torch.addcmul(x[left], spread(size[left], x), normal[left])
        broken, within = decisions.nearer(some.take(left), tried)
        far[left[broken]], radius[left[broken]] = tried[broken], within[broken]
        left, size = left[~broken], size / 2
        if not len(left):
            break
    decisions.search(some, far, radius)
