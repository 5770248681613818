"""EAD (elastic-net attack): the attack of Carlini and Wagner with an additional penalty on the L1 distance.

Chen et al., "EAD: Elastic-Net Attacks to Deep Neural Networks via Adversarial Examples", AAAI 2018, arXiv:1709.04114.
Differs from the paper: the weight of the margin starts where the first step just changes a value instead of from one
constant for all, the points of the gradients are evaluated, the closest point in L1 is returned, an example is dropped
once it is broken inside a finite eps, and it ends with a bisection to the boundary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import Closest, expect_norm, firmly_broken, margin_loss
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L1, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, PerExample, Positive, Steps

_TINIEST = 1e-30  # prevents a division by zero where the gradient is zero
_GROWTH = 10.0  # growth of the weight while none was large enough


@dataclass(frozen=True)
class EAD:
    """Minimises the squared L2 distance, `beta` times the L1 distance and a multiple of the margin with FISTA."""

    searches: Steps = 9
    """number of weights of the margin that are tried for each example"""
    steps: Steps = 100
    """number of gradient steps for each weight"""
    step_size: Positive = 0.01
    """first step size; it falls to zero with the square root of the remaining steps"""
    beta: Positive = 0.01
    """amount by which each step shrinks every change, as a fraction of the width of the box"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L1)
        closest = Closest(batch)
        grad, logits = gradient(model, batch, margin_loss)
        closest.offer(batch, batch.x, torch.zeros_like(closest.distance), firmly_broken(logits, batch))
        steepest = grad.abs().flatten(1).amax(1).clamp_min(_TINIEST)
        weight = 2 * self.beta * model.bounds.width / (self.step_size * steepest)
        low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        remaining = batch
        for _ in range(self.searches):
            active = closest.unsolved(remaining, norm.eps)
            remaining, weight, low, high = remaining.take(active), weight[active], low[active], high[active]
            if not len(remaining):
                break
            sufficient = self._descend(model, remaining, weight, norm, closest)
            low, high = torch.where(sufficient, low, weight), torch.where(sufficient, weight, high)
            weight = torch.where(high < torch.inf, (low + high) / 2, _GROWTH * weight)
        return to_boundary(model, batch, closest.x, norm)

    def _descend(self, model: Model, batch: Batch, weight: PerExample, norm: Norm, closest: Closest) -> Mask:
        """One run from the clean input; offers broken points; returns where the weight was large enough."""
        x = extrapolated = batch.x
        ever_broken = torch.zeros_like(weight, dtype=torch.bool)
        for step in range(self.steps):
            grad, logits = gradient(model, batch.at(extrapolated), margin_loss)
            broken = firmly_broken(logits, batch)
            closest.offer(batch, extrapolated, norm.distance(extrapolated, batch.x), broken)
            ever_broken = ever_broken | broken
            size = self.step_size * (1 - step / self.steps) ** 0.5
            margin_grad = spread(weight, x) * grad * spread(~broken, x)
            delta = extrapolated - batch.x
            delta = delta + size * (margin_grad - 2 * delta)
            shrunk = delta.sign() * (delta.abs() - self.beta * model.bounds.width).clamp_min(0)
            previous, x = x, model.bounds.clamp(batch.x + shrunk)
            extrapolated = model.bounds.clamp(x + step / (step + 3) * (x - previous))
        return ever_broken
