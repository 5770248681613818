"""DDN (decoupled direction and norm): finds the smallest L2 change with gradient steps on spheres around the clean
input, whose radius shrinks after a success and grows after a failure.

Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses",
CVPR 2019, arXiv:1811.09600. Differs from the paper: the first radius and the step size are in units of the first-order
distance to the boundary instead of pixels, the radius grows three times as fast until the first success, gradients omit
coordinates at the sides of the box, nothing is rounded to 256 levels, and it ends with a bisection to the boundary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import (
    Closest,
    Loss,
    cross_entropy,
    expect_norm,
    farthest,
    firmly_broken,
    free,
    gap,
    margin_loss,
)
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps


@dataclass(frozen=True)
class DDN:
    """Finds the smallest L2 change by gradient steps whose radius shrinks after a success and grows otherwise."""

    steps: Steps = 100
    """number of gradient steps"""
    gamma: Positive = 0.05
    """fraction by which the radius shrinks or grows in a step"""
    loss: Loss = cross_entropy
    """loss that is maximised; the first radius comes from one further gradient, that of the margin at the
    clean input"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        closest, x, limit = Closest(batch), batch.x, farthest(norm, batch.x, model.bounds)
        grad, logits = gradient(model, batch, margin_loss)
        first = gap(norm, free(grad, x, model.bounds), logits, batch, model.bounds).minimum(limit)
        radius = first
        for step in range(self.steps):
            grad, logits = gradient(model, batch.at(x), self.loss)
            grad, broken = free(grad, x, model.bounds), firmly_broken(logits, batch)
            closest.offer(batch, x, norm.distance(x, batch.x), broken)
            if step:
                growth = torch.where(
                    closest.found, self.gamma, 3 * self.gamma
                )  # faster growth until the first success
                radius = (radius * torch.where(broken, 1 - self.gamma, 1 + growth)).minimum(limit)
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            stepped = x + spread((0.01 + 0.99 * cosine) * first, x) * norm.steepest(grad, x, model.bounds)
            direction = norm.steepest(stepped - batch.x, x, model.bounds)
            x = model.bounds.clamp(batch.x + spread(radius, x) * direction)
        return to_boundary(model, batch, closest.x, norm)
