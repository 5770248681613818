"""FMN (fast minimum-norm attack): follows the gradient inside a ball whose radius adapts until it is the smallest that
contains an adversarial example.

Pintor et al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints", NeurIPS 2021,
arXiv:2102.12827. Differs from the paper: steps follow the norm's own steepest direction (L0: the gradient), their
length is in units of the first-order distance to the boundary (L0: of the box), gradients omit coordinates at the sides
of the box, and it ends with a bisection to the boundary (L0: undoing changes).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import (
    Closest,
    expect_norm,
    farthest,
    firmly_broken,
    free,
    gap,
    margin_loss,
)
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, PerExample, Positive, Steps


@dataclass(frozen=True)
class FMN:
    """Finds the smallest change by gradient steps in a ball that shrinks after a success and grows otherwise."""

    steps: Steps = 100
    """number of gradient steps"""
    step_size: Positive = 1.0
    """first step size in first-order distances (L0: in widths of the box); it falls to a hundredth along a cosine"""
    gamma: Positive = 0.05
    """fraction by which the radius changes in the first step; it falls to 0.001 along a cosine"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, Linf, L2, L1, L0)
        sparse = isinstance(norm, L0)
        climb = L2() if sparse else norm
        closest, x, limit = Closest(batch), batch.x, farthest(norm, batch.x, model.bounds)
        radius = torch.ones_like(limit) if sparse else limit
        for step in range(self.steps):
            grad, logits = gradient(model, batch.at(x), margin_loss)
            broken, distance = firmly_broken(logits, batch), norm.distance(x, batch.x)
            grad = free(grad, x, model.bounds)
            closest.offer(batch, x, distance, broken)
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            gamma = 0.001 + (self.gamma - 0.001) * cosine
            if sparse:
                radius = _next_l0_radius(radius, gamma, broken, closest.distance)
            else:
                boundary = distance + gap(norm, grad, logits, batch.at(x), model.bounds)
                grown = torch.where(closest.found, radius * (1 + gamma), boundary)
                radius = torch.where(broken, (radius * (1 - gamma)).minimum(closest.distance), grown)
            radius = radius.minimum(limit)
            if step == 0:
                first = self.step_size * (torch.full_like(radius, model.bounds.width) if sparse else radius)
            size = spread(first * (0.01 + 0.99 * cosine), x)
            x = norm.within(x + size * climb.steepest(grad, x, model.bounds), batch.x, model.bounds, radius)
        return to_boundary(model, batch, closest.x, norm)


def _next_l0_radius(radius: PerExample, gamma: float, broken: Mask, closest: PerExample) -> PerExample:
    """The next radius in values: at least one more or fewer than before."""
    fewer = torch.minimum(radius - 1, (radius * (1 - gamma)).floor()).minimum(closest)
    more = torch.maximum(radius + 1, (radius * (1 + gamma)).floor())
    return torch.where(broken, fewer, more).clamp_min(1)
