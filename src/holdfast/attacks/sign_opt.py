"""Sign-OPT: turn the ray from the clean input to where the boundary along it is nearer, by the signs of derivatives.

Cheng et al., "Sign-OPT: A Query-Efficient Hard-label Adversarial Attack", ICLR 2020, arXiv:1909.10773.
Differs from the paper: directions are half of low frequency where the inputs are images, turn the ray a hundred times
as far, and are asked about beside its end, not brought back to its length; the mean sign is taken off; a step is judged
at the distance known, before its own is searched; and the nearest of several starts is taken.
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

_LENGTHS = 8  # lengths of a step that are tried, each twice or half the one before


@dataclass(frozen=True)
class SignOPT:
    """Turn the ray by the signs of its derivatives, with a step whose length is searched each time."""

    queries: Steps = 5000
    """forwards for each example, at most; the threat model's budget where that is less"""
    draws: Steps = 30
    """directions whose sign is asked for each gradient"""
    epsilon: Positive = 0.1
    """how far the ray is turned into each of them, as a share of its length"""
    step_size: Positive = 0.2
    """how far the ray turns first, as a share of its length; then as far as helped last"""
    frequencies: Fraction = 0.5
    """share of an image's frequencies, lowest first, that half of each direction is made of; 1 is noise alone"""

    needs: ClassVar[Access] = "labels"

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
    """Step to `x + alpha * against`, twice as far while that helps, or half as far until it does: what helped last."""
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
