"""Sigma-zero: finds the smallest number of changed values by gradient descent on a smooth approximation of the L0 norm.

Cinà et al., "σ-zero: Gradient-based Optimization of ℓ0-norm Adversarial Examples", ICLR 2025, arXiv:2402.01879.
Differs from the paper: lengths are fractions of the box's edges, under `10px` the channels of a pixel count as one, an
example is dropped once it is broken inside a finite eps, and it ends by undoing the changes that are not needed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import Adam, gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import Closest, expect_norm, firmly_broken, margin_loss
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L0
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Steps

_TINY = 1e-12  # prevents divisions by zero, for a zero gradient and for equal bounds


@dataclass(frozen=True)
class SigmaZero:
    """Changes as few values as possible, by gradient descent on a smooth approximation of the L0 norm."""

    steps: Steps = 200
    """number of gradient steps"""
    step_size: Positive = 1.0
    """first step size of a value, as a fraction of the width of its box; it falls to a tenth along a cosine"""
    sigma: Positive = 0.001
    """squared change that counts as half a changed value in the approximation of the L0 norm"""
    threshold: Fraction = 0.3
    """first threshold below which a change is set to zero, as a fraction of the width of the box"""
    pace: Positive = 0.01
    """change of the threshold per step, as a fraction of the step size; it rises while the example is broken, and falls
    else"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L0)
        assert isinstance(norm, L0)
        low, high = model.bounds.like(batch.x)
        edge = (high - low).clamp_min(_TINY)
        closest, remaining, x, size = Closest(batch), batch, batch.x, self.step_size
        adam, threshold = Adam(x), torch.full_like(closest.distance, self.threshold)
        for step in range(self.steps):
            grad, logits = gradient(model, remaining.at(x), margin_loss)
            broken = firmly_broken(logits, remaining)
            closest.offer(remaining, x, norm.distance(x, remaining.x), broken)
            active = closest.unsolved(remaining, norm.eps)
            if not active.all():
                remaining, x, grad, broken = remaining.take(active), x[active], grad[active], broken[active]
                threshold = threshold[active]
                adam.take(active)
                if not len(remaining):
                    break
            objective_grad = self._slope(norm, (x - remaining.x) / edge) - edge * grad * spread(~broken, x)
            mean, scale = adam.mean_and_scale(
                objective_grad / spread(objective_grad.flatten(1).abs().amax(1).clamp_min(_TINY), x)
            )
            x = model.bounds.clamp(x - size * edge * mean / scale)
            size = self.step_size * (0.1 + 0.9 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            threshold = (threshold + self.pace * size * torch.where(broken, 1.0, -1.0)).clamp(0, 1)
            small = norm.summed(((x - remaining.x) / edge) ** 2).sqrt() < spread(threshold, x)
            x = torch.where(small, remaining.x, x)
        return to_boundary(model, batch, closest.x, norm)

    def _slope(self, norm: L0, delta: Inputs) -> Inputs:
        """Gradient of the smooth share of changed values."""
        square = norm.summed(delta**2)
        units = norm.distance(torch.ones_like(delta), torch.zeros_like(delta))
        return 2 * self.sigma * delta / ((square + self.sigma) ** 2 * spread(units, delta))
