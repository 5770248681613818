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

from holdfast.attacks.parts.boundaries import Decisions, normal
from holdfast.attacks.parts.losses import expect_norm
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, PerExample, Positive, Steps

_LENGTHS = 8  # number of step sizes that are tried, each twice or half the one before


@dataclass(frozen=True)
class SignOPT:
    """Finds the direction with the nearest boundary, by signs of directional derivatives from labels alone."""

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
            for step, active in decisions.steps(rng):
                rows, (x, distance) = decisions.closest.rows(active), decisions.closest_points(active)
                radius = self.epsilon * distance
                direction = normal(
                    decisions, active, x, radius, self.draws, rng.at(step), share=self.frequencies
                )
                alpha[rows] = _search_step(decisions, active, x, spread(distance, x) * direction, alpha[rows])
        return decisions.result()


def _search_step(
    decisions: Decisions, active: Batch, x: Inputs, direction: Inputs, alpha: PerExample
) -> PerExample:
    """Step to `x + alpha * against`, doubled while it helps or halved until it does; return the best `alpha`."""
    closer = decisions.improve(active, x + spread(alpha, x) * direction)
    best, factor = alpha.clone(), torch.where(closer, 2.0, 0.5).to(alpha.dtype)
    rows = torch.arange(len(active), device=x.device)
    for _ in range(_LENGTHS):
        alpha = alpha * factor
        still_closer = decisions.improve(
            active.take(rows), x[rows] + spread(alpha[rows], x) * direction[rows]
        )
        best[rows[still_closer]] = alpha[rows[still_closer]]
        rows = rows[still_closer == closer[rows]]
        if not len(rows):
            break
    return best
