"""ALMA (augmented Lagrangian method for adversarial attacks): finds the smallest change that the model gets wrong, by
an augmented Lagrangian method.

Rony et al., "Augmented Lagrangian Adversarial Attacks", ICCV 2021, arXiv:2011.11857; penalty P2, and RMSProp with
momentum. Differs from the paper: distances and the first step are in units of the first-order distance to the boundary;
it ends with a bisection to the boundary or, with `refine` (our own), with steps inside the ball.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import (
    Closest,
    dlr,
    expect_norm,
    farthest,
    firmly_broken,
    gap,
    length,
    margin_loss,
)
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L1, L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Fraction, Inputs, Logits, Mask, PerExample, Positive, Steps

_TINY, _TINIEST = 1e-12, 1e-15  # prevent divisions by zero
_TOLERANCE = 1e-4  # distance of the constraint beyond the boundary, in units of DLR
_IMPROVED, _TIGHTER, _CHECKED = 0.95, 1.2, 10  # the paper's tau, gamma and M


@dataclass(frozen=True)
class ALMA:
    """Finds the smallest adversarial change by an augmented Lagrangian method with a penalty for each example."""

    steps: Steps = 100
    """number of gradient steps"""
    reach: Positive = 2.0
    """length of the first step in first-order distances"""
    fall: Fraction = 0.01
    """factor by which the step size has fallen at the last step; it starts to fall at the first success"""
    memory: Fraction = 0.5
    """weight of earlier values in the running means of multiplier, squared gradient and momentum; 0.9 suits
    1,000 steps"""
    refine: Count = 0
    """number of gradient steps inside a finite ball, from the projections of the points that ended outside; other
    points do not change"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2, L1)
        closest, x = Closest(batch), batch.x
        grad, logits = gradient(model, batch, margin_loss)
        first = gap(norm, grad, logits, batch, model.bounds).minimum(farthest(norm, x, model.bounds))
        first = first.clamp_min(_TINY)
        distance_weight = _violation(logits, batch).abs() / first
        penalty, descent = _Penalty(first, self.memory), _Descent(x, self.memory)
        first_success = torch.full_like(first, self.steps)
        for step in range(self.steps):
            grad, logits = gradient(model, batch.at(x), dlr)
            broken = firmly_broken(logits, batch)
            closest.offer(batch, x, norm.distance(x, batch.x), broken)
            first_success = torch.where(broken & (first_success == self.steps), step, first_success)
            slope = penalty.slope(step, _violation(logits, batch), closest.found)
            objective_grad = (
                spread(distance_weight, x) * _outward(norm, x - batch.x) - spread(slope, x) * grad
            )
            direction = descent.direction(objective_grad)
            if step == 0:
                size = self.reach * first / norm.distance(direction, torch.zeros_like(x)).clamp_min(_TINY)
            fall = self.fall ** (
                (step - first_success).clamp_min(0) / (self.steps - first_success).clamp_min(1)
            )
            x = model.bounds.clamp(x - spread(size * fall, x) * direction)
        return to_boundary(model, batch, closest.x, norm, self.refine)


class _Penalty:
    """The paper's penalty P2, with a multiplier mu and a strength rho for each example that follow its constraint."""

    def __init__(self, like: PerExample, memory: float) -> None:
        self._memory = memory
        self._mu, self._rho, self._last = torch.ones_like(like), torch.ones_like(like), like

    def slope(self, step: int, violation: PerExample, succeeded: Mask) -> PerExample:
        """Update the multipliers of the augmented Lagrangian after a step, and return the derivative of the penalty
        with respect to the value of the constraint, for each example.
        """
        if step:
            # as in the paper
            self._mu = torch.lerp(self._derivative(violation), self._mu, self._memory).clamp(1e-6, 1e12)
        if step % _CHECKED == 0:
            stuck = ~succeeded & ~(violation < _IMPROVED * self._last)
            self._rho = torch.where(stuck, _TIGHTER * self._rho, self._rho) if step else self._rho
            self._last = violation
        return self._derivative(violation)

    def _derivative(self, violation: PerExample) -> PerExample:
        violated = self._mu * (1 + 2 * self._rho * violation) + (self._rho * violation) ** 2 / 2
        satisfied = self._mu / (1 - self._rho * violation.clamp_max(0)) ** 2
        return torch.where(violation >= 0, violated, satisfied)


class _Descent:
    """RMSProp with momentum."""

    def __init__(self, like: Inputs, memory: float) -> None:
        self._memory = memory
        self._momentum, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._first_step = True

    def direction(self, objective_grad: Inputs) -> Inputs:
        """Update the momentum and the mean square of RMSProp with the gradient of the objective, and return the
        momentum, against which ALMA moves the inputs.
        """
        if self._first_step:
            self._square = spread(objective_grad.flatten(1).square().mean(1), objective_grad).expand_as(
                objective_grad
            )
            self._first_step = False
        self._square = torch.lerp(objective_grad**2, self._square, self._memory)
        self._momentum = self._memory * self._momentum + objective_grad / (self._square.sqrt() + _TINIEST)
        return self._momentum


def _violation(logits: Logits, batch: Batch) -> PerExample:
    """Value of the constraint: positive while it is violated."""
    return (_TOLERANCE - dlr(logits, batch)).nan_to_num(-1.0, 1.0, -1.0)


def _outward(norm: Norm, delta: Inputs) -> Inputs:
    """Gradient of the distance; zero at the clean input."""
    if isinstance(norm, L1):
        return delta.sign()
    return delta / spread(length(delta).clamp_min(_TINY), delta)
