"""Sign-OPT: a label-based attack that turns a direction from the clean input towards a nearer decision boundary, using
the signs of directional derivatives.

Cheng et al., "Sign-OPT: A Query-Efficient Hard-label Adversarial Attack", ICLR 2020, arXiv:1909.10773. Differs from the
paper: for images half of the directions' energy is in low frequencies; directions turn the ray a hundred times as far
and are queried without rescaling to its length; the mean sign is subtracted; a step is evaluated at the known distance
before its own boundary is searched; and the nearest of several starts is used.
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
from holdfast.core.types import Access, Fraction, Inputs, PerExample, Positive, Steps
from holdfast.ops.decisions import Decisions
from holdfast.ops.normals import normal
from holdfast.ops.norms import expect_norm

_LENGTHS = 8  # number of step sizes that are tried, each twice or half the one before


@dataclass(frozen=True)
class SignOPT:
    """Minimises the distance to the boundary over directions, by signs of directional derivatives from labels alone."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    draws: Steps = 30
    """number of directions that are queried for each gradient"""
    epsilon: Positive = 0.1
    """length of a queried direction, as a fraction of the length of the ray"""
    step_size: Positive = 0.2
    """first step size, as a fraction of the length of the ray; later steps start with the size of the last successful
    step"""
    frequencies: Fraction = 0.5
    """fraction of an image's frequencies, lowest first, with half of the energy of each direction; 1 for white noise"""

    needs: ClassVar[Access] = "labels"
    batched: ClassVar[bool] = False

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        decisions = Decisions(model, batch, norm, min(self.queries, threat.queries or self.queries))
        alpha = torch.full_like(decisions.closest.distance, self.step_size)
        with torch.no_grad():
            for step, some in decisions.steps(rng):
                rows, (x, distance) = decisions.closest.rows(some), decisions.known(some)
                radius = self.epsilon * distance
                against = normal(decisions, some, x, radius, self.draws, rng.at(step), share=self.frequencies)
                alpha[rows] = _turn(decisions, some, x, spread(distance, x) * against, alpha[rows])
        return decisions.found()


def _turn(decisions: Decisions, some: Batch, x: Inputs, against: Inputs, alpha: PerExample) -> PerExample:
    """Step to `x + alpha * against`, doubled while it helps or halved until it does; return the best `alpha`."""
    helps = decisions.improve(some, x + spread(alpha, x) * against)
    best, factor = alpha.clone(), torch.where(helps, 2.0, 0.5).to(alpha.dtype)
    left = torch.arange(len(some), device=x.device)
    for _ in range(_LENGTHS):
        alpha = alpha * factor
        again = decisions.improve(some.take(left), x[left] + spread(alpha[left], x) * against[left])
        best[left[again]] = alpha[left[again]]
        left = left[again == helps[left]]
        if not len(left):
            break
    return best
