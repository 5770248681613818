"""EAD (elastic-net attack): the attack of Carlini and Wagner with an additional penalty on the L1 distance.

Chen et al., "EAD: Elastic-Net Attacks to Deep Neural Networks via Adversarial Examples", AAAI 2018, arXiv:1709.04114.
Differs from the paper: the weight of the margin starts where the first step just changes a value instead of from one
constant for all, the points of the gradients are evaluated, the closest point in L1 is returned, an example is dropped
once it is broken inside a finite eps, and it ends with a bisection to the boundary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, PerExample, Positive, Steps
from holdfast.ops.ascent import gradient
from holdfast.ops.boundary import to_boundary
from holdfast.ops.closest import Closest, firmly_broken
from holdfast.ops.losses import margin_loss
from holdfast.ops.norms import expect_norm

_TINIEST = 1e-30
_DEARER = 10.0  # growth of the weight while none was large enough


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
        left = batch
        for _ in range(self.searches):
            stays = closest.far(left, norm.eps)
            left, weight, low, high = left.take(stays), weight[stays], low[stays], high[stays]
            if not len(left):
                break
            enough = self._descend(model, left, weight, norm, closest)
            low, high = torch.where(enough, low, weight), torch.where(enough, weight, high)
            weight = torch.where(high < torch.inf, (low + high) / 2, _DEARER * weight)
        return to_boundary(model, batch, closest.x, norm)

    def _descend(self, model: Model, batch: Batch, weight: PerExample, norm: Norm, closest: Closest) -> Mask:
        """One run from the clean input; offers broken points; returns where the weight was large enough."""
        x = ahead = batch.x
        ever_broken = torch.zeros_like(weight, dtype=torch.bool)
        for step in range(self.steps):
            grad, logits = gradient(model, batch.at(ahead), margin_loss)
            broken = firmly_broken(logits, batch)
            closest.offer(batch, ahead, norm.distance(ahead, batch.x), broken)
            ever_broken = ever_broken | broken
            size = self.step_size * (1 - step / self.steps) ** 0.5
            push = spread(weight, x) * grad * spread(~broken, x)
            delta = ahead - batch.x
            delta = delta + size * (push - 2 * delta)
            shrunk = delta.sign() * (delta.abs() - self.beta * model.bounds.width).clamp_min(0)
            last, x = x, model.bounds.clamp(batch.x + shrunk)
            ahead = model.bounds.clamp(x + step / (step + 3) * (x - last))
        return ever_broken
