"""SuperDeepFool: DeepFool to the boundary, then back onto the boundary's normal through the clean input, in turn.

Abdolahpourrostam, Abroshan & Moosavi-Dezfooli, "Revisiting DeepFool: generalization and improvement", TMLR 2024,
arXiv:2303.12481; this is its SDF(∞, 1). Differs from the paper: the normal is that of the margin, examples take their
turns each on its own, the closest of all broken points is kept, an example leaves once it is broken inside a finite
eps, and DeepFool's steps are those of `DeepFool`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.rows import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Mask, Positive, Steps
from holdfast.ops.ascent import gradient
from holdfast.ops.boundary import to_boundary
from holdfast.ops.closest import Closest, firmly_broken
from holdfast.ops.losses import margin_loss
from holdfast.ops.norms import expect_norm, free
from holdfast.ops.planes import across, planes, rivals_of


@dataclass(frozen=True)
class SuperDeepFool:
    """Step across the nearest linear boundary until the model breaks, then stand up straight on the boundary there."""

    steps: Steps = 50
    """steps of both kinds at most; an example stops when one onto the normal leaves the model broken"""
    candidates: Steps = 9
    """how many of the likeliest other classes are looked at"""
    overshoot: Positive = 0.02
    """share of the whole way by which a step goes beyond the linear boundary"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        closest, left, x = Closest(batch), batch, batch.x
        with torch.no_grad():
            logits = model(x, batch.ids)
        rivals = rivals_of(logits, batch, self.candidates)
        straight = torch.zeros_like(closest.found)
        for step in range(self.steps + 1):
            broken = firmly_broken(logits, left)
            closest.offer(left, x, norm.distance(x, left.x), broken)
            stays = closest.far(left, norm.eps) & ~(broken & straight)
            left, x, rivals, straight = left.take(stays), x[stays], rivals[stays], broken[stays]
            if step == self.steps or not len(left):
                break
            x = self._moved(model, left, x, rivals, straight, norm, late=step >= self.steps // 2)
            with torch.no_grad():
                logits = model(x, left.ids)
        return to_boundary(model, batch, closest.x, norm)

    def _moved(
        self, model: Model, batch: Batch, x: Inputs, rivals: Tensor, straight: Mask, norm: Norm, *, late: bool
    ) -> Inputs:
        """Where each example goes next: from a broken point onto the normal there, from another across a plane."""
        result = x.clone()
        some, rows = batch.take(straight), straight.nonzero()[:, 0]
        if len(some):
            grad, _ = gradient(model, some.at(x[rows]), margin_loss)
            normal = norm.steepest(grad, some.x, model.bounds)
            height = ((x[rows] - some.x) * normal).flatten(1).sum(1)
            result[rows] = model.bounds.clamp(some.x + spread(height, normal) * normal)
        some, rows = batch.take(~straight), (~straight).nonzero()[:, 0]
        if len(some):
            margins, grads = planes(model, some, x[rows], rivals[rows])
            if late:
                grads = [free(grad, x[rows], model.bounds) for grad in grads]
            result[rows] = across(norm, model.bounds, some, x[rows], grads, margins, self.overshoot)
        return result
