"""CAPGD: projected gradient ascent on the rows of a table, which are rounded and repaired in every step.

Simonetto et al., "Constrained Adaptive Attack: Effective Adversarial Attack Against Deep Neural Networks for Tabular
Data", NeurIPS 2024, arXiv:2406.00775.
Differs from the paper: the step size follows a cosine instead of checkpoints; each step is taken from a point that is
not rounded, so that small steps add up, and in most steps not repaired; the best row counts instead of the last.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import cosine, gradient
from holdfast.attacks.parts.images import expect_table
from holdfast.attacks.parts.losses import Best, Loss, margin, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import levelled
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, NonNegative, Positive, Restarts, Steps
from holdfast.threats.tables import Table


@dataclass(frozen=True)
class CAPGD:
    """Gradient ascent on the loss less the violation of the relations, within the rules of a table."""

    steps: Steps = 60
    """number of gradient steps of one restart"""
    restarts: Restarts = 4
    """number of starts: the clean row, then random rows"""
    reach: Positive = 8.0
    """length of the path in budgets"""
    momentum: Fraction = 0.75
    """share of the last direction that is kept"""
    penalty: NonNegative = 0.1
    """weight of the violation of the relations against the loss, both as directions of length one"""
    every: Steps = 5
    """number of steps after which the path continues from the repaired row"""
    loss: Loss = margin_loss
    """loss that is maximised"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_table(threat.constraint, self), Best(batch)
        for restart in range(self.restarts):
            remaining = batch.take(best.surviving)
            if not len(remaining):
                break
            start = remaining.x
            if restart:
                start = constraint.sample(remaining, model.bounds, rng.at("restart", restart))
            self._ascend(model, remaining, start, constraint, best)
        return best.x

    def _ascend(self, model: Model, batch: Batch, start: Inputs, constraint: Table, best: Best) -> None:
        """Offer the rows of one path to `best`."""
        point = start.double()
        direction = torch.zeros_like(start)
        for step in range(self.steps):
            x = constraint.valid(point, batch.x)
            slope, logits = gradient(model, batch.at(x), self.loss)
            margins = margin(logits, batch)
            best.offer(batch, x, margins)
            surviving = margins > 0
            if not surviving.all():
                if not surviving.any():
                    return
                batch, x, slope = batch.take(surviving), x[surviving], slope[surviving]
                point, direction = point[surviving], direction[surviving]
            climb = constraint.steepest(slope, batch.x, model.bounds)
            if self.penalty and constraint.rules.relations:
                climb = climb - self.penalty * constraint.steepest(
                    _penalty_slope(constraint, point).to(slope.dtype), batch.x, model.bounds
                )
            direction = self.momentum * direction + (1 - self.momentum) * climb
            size = self.reach * constraint.eps / self.steps * cosine(step, self.steps)
            origin = x.double() if (step + 1) % self.every == 0 else point
            point = constraint.moved(origin + size * direction.double(), batch.x)
        with torch.no_grad():
            x = constraint.valid(point, batch.x)
            best.offer(batch, x, margin(model(x, batch.ids), batch))


def _penalty_slope(constraint: Table, point: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the violation of the relations at unrounded points."""
    with torch.enable_grad():
        at = point.detach().requires_grad_()
        penalty = constraint.penalty(at)
        if not penalty.requires_grad:
            return torch.zeros_like(point)
        (slope,) = torch.autograd.grad(penalty.sum(), at)
    return levelled(slope.nan_to_num(0.0, 0.0, 0.0))
