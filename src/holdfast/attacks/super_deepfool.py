"""SuperDeepFool: DeepFool to the boundary, then back towards the boundary's normal through the clean input, in turn.

Abdolahpourrostam, Abroshan & Moosavi-Dezfooli, "Revisiting DeepFool: generalization and improvement", TMLR 2024,
arXiv:2303.12481; this is its SDF(∞, 1). Differs from the paper: the normal is that of the margin, the way onto it is
gone by half (the whole way swings from side to side of a curved boundary and never stands still), examples take their
turns each on its own until one has come no closer three times, only the two likeliest classes are looked at once an
example was broken, the closest of all broken points is kept, an example leaves once it is broken inside a finite eps,
and DeepFool's steps are those of `DeepFool`, but do without the features that the box holds from the first one on.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps
from holdfast.ops.ascent import gradient
from holdfast.ops.boundary import to_boundary
from holdfast.ops.closest import Closest, firmly_broken
from holdfast.ops.losses import margin_loss
from holdfast.ops.norms import expect_norm, free
from holdfast.ops.planes import across, planes, rivals_of

_HALF = 0.5
_VAIN = 3  # broken points that come no closer, in a row, before an example leaves
_LIKELIEST = 2  # classes to look at from near the boundary


@dataclass(frozen=True)
class SuperDeepFool:
    """Step across the nearest linear boundary until the model breaks, then stand up straight on the boundary there."""

    steps: Steps = 50
    """steps of both kinds at most; an example stops when three broken points in a row come no closer"""
    candidates: Steps = 9
    """how many of the likeliest other classes are looked at until an example breaks; then it is two"""
    overshoot: Positive = 0.02
    """share of the whole way by which a step goes beyond the linear boundary"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        closest, left, x = Closest(batch), batch, batch.x
        with torch.no_grad():
            logits = model(x, batch.ids)
        vain = torch.zeros_like(batch.y)
        for step in range(self.steps + 1):
            broken = firmly_broken(logits, left)
            closer = closest.offer(left, x, norm.distance(x, left.x), broken)
            vain = torch.where(closer, 0, vain + broken)
            stays = closest.far(left, norm.eps) & (vain < _VAIN)
            left, x, logits, broken, vain = (
                left.take(stays),
                x[stays],
                logits[stays],
                broken[stays],
                vain[stays],
            )
            if step == self.steps or not len(left):
                break
            near, start = closest.found[closest.rows(left)], x
            x = start.clone()
            if broken.any():
                x[broken] = _straightened(model, left.take(broken), start[broken], norm)
            for rows, classes in ((~near, self.candidates), (near & ~broken, _LIKELIEST)):
                if rows.any():
                    some = left.take(rows)
                    rivals = rivals_of(logits[rows], some, classes)
                    x[rows] = self._across(model, some, start[rows], rivals, norm)
            with torch.no_grad():
                logits = model(x, left.ids)
        return to_boundary(model, batch, closest.x, norm)

    def _across(self, model: Model, batch: Batch, x: Inputs, rivals: Tensor, norm: Norm) -> Inputs:
        """One step of DeepFool, by what the box leaves free."""
        margins, grads = planes(model, batch, x, rivals)
        grads = [free(grad, x, model.bounds) for grad in grads]
        return across(norm, model.bounds, batch, x, grads, margins, self.overshoot)


def _straightened(model: Model, batch: Batch, x: Inputs, norm: Norm) -> Inputs:
    """Half of the way from broken points onto the normal of the boundary there through the clean input."""
    grad, _ = gradient(model, batch.at(x), margin_loss)
    normal = norm.steepest(grad, batch.x, model.bounds)
    height = ((x - batch.x) * normal).flatten(1).sum(1)
    upright = batch.x + spread(height, normal) * normal
    return model.bounds.clamp(torch.lerp(x, upright, _HALF))
