"""C&W (Carlini and Wagner): minimises the size of the change plus a constant times the margin by gradient descent, and
searches for the best constant.

Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, arXiv:1608.04644. Differs from the
paper: points are projected onto the box (their first option) instead of tanh, whose slope vanishes at black and white
pixels; the search starts from the first-order distance to the boundary instead of one constant for all; step sizes of
Adam follow a cosine; every run has a longer path than the one before, to leave the first one's minimum; under Linf
the search brackets the size tau above which changes are penalised; and it ends with a bisection to the boundary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import Adam, gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import (
    Closest,
    expect_norm,
    farthest,
    firmly_broken,
    free,
    gap,
    length,
    margin_loss,
)
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, PerExample, Positive, Steps

_TINIEST = 1e-30  # prevents a division by zero where the gradient is zero
_GROWTH = 4.0  # growth of the constant while none was large enough


@dataclass(frozen=True)
class CarliniWagner:
    """Minimises the distance plus a constant times the margin with Adam, and searches for the constant."""

    searches: Steps = 9
    """number of constants that are tried for each example"""
    steps: Steps = 100
    """number of gradient steps for each constant"""
    reach: Positive = 1.0
    """path length of one coordinate in the first run, in units of the first-order distance to the boundary"""
    growth: Positive = 16.0
    """path length of the last run relative to the first one"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2, Linf)
        grad, logits = gradient(model, batch, margin_loss)
        grad = free(grad, batch.x, model.bounds).flatten(1)
        first = gap(norm, grad.view_as(batch.x), logits, batch, model.bounds)
        first = first.minimum(farthest(norm, batch.x, model.bounds))
        closest = Closest(batch)
        closest.offer(batch, batch.x, torch.zeros_like(first), firmly_broken(logits, batch))
        if isinstance(
            norm, L2
        ):  # size + c * margin: at the optimum of a linear model c is twice distance / slope
            price, weight = 2 * first / length(grad).clamp_min(_TINIEST), torch.ones_like(first)
        else:  # the penalty above tau exceeds any coordinate of the margin's gradient
            price, weight = 1.5 * first, 1 / grad.abs().amax(1).clamp_min(_TINIEST)
        low, high = torch.zeros_like(price), torch.full_like(price, torch.inf)
        for k in range(self.searches):
            reach = self.reach * self.growth ** (k / max(self.searches - 1, 1))
            solved = self._descend(model, batch, norm, price, weight, 2 * reach / self.steps * first, closest)
            low, high = torch.where(solved, low, price), torch.where(solved, price, high)
            price = torch.where(high < torch.inf, (low + high) / 2, _GROWTH * price)
        return to_boundary(model, batch, closest.x, norm)

    def _descend(
        self,
        model: Model,
        batch: Batch,
        norm: Norm,
        price: PerExample,
        weight: PerExample,
        lr: PerExample,
        closest: Closest,
    ) -> Mask:
        """One run of Adam from the clean input; offers broken points; returns where the constant was large enough."""
        x, solved, tau = batch.x, torch.zeros_like(price, dtype=torch.bool), spread(price, batch.x)
        margin_weight = spread(price if isinstance(norm, L2) else weight, x)
        adam = Adam(x)
        for step in range(1, self.steps + 1):
            grad, logits = gradient(model, batch.at(x), margin_loss)
            broken, distance = firmly_broken(logits, batch), norm.distance(x, batch.x)
            closest.offer(batch, x, distance, broken)
            delta = x - batch.x
            if isinstance(norm, L2):
                solved, distance_grad = solved | broken, 2 * delta
            else:
                solved, distance_grad = (
                    solved | broken & (distance <= 1.1 * price),
                    delta.sign() * (delta.abs() > tau),
                )
            objective_grad = distance_grad - margin_weight * grad * spread(~broken, x)
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            x = model.bounds.clamp(x - spread(lr * (0.01 + 0.99 * cosine), x) * adam(objective_grad))
        return solved
