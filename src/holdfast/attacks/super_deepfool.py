"""SuperDeepFool: alternates DeepFool steps to the decision boundary with projections onto the boundary's normal through
the clean input.

Abdolpourrostam, Abroshan & Moosavi-Dezfooli, "Revisiting DeepFool: generalization and improvement", TMLR 2024,
arXiv:2303.12481; this is its SDF(∞, 1). Differs from the paper: the normal is that of the margin; a projection goes
half of the way (the whole way oscillates between the sides of a curved boundary); examples alternate independently,
each until three broken points in a row are no closer; only the two likeliest classes are compared once an example was
broken; the closest of all broken points is returned; an example is dropped once it is broken inside a finite eps; and
DeepFool's steps are those of `DeepFool`, but leave out features at the sides of the box from the first one on.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.boundaries import across, planes, rivals_of, to_boundary
from holdfast.attacks.parts.losses import Closest, expect_norm, firmly_broken, free, margin_loss
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps

_HALF = 0.5  # share of the way of a projection; the whole way oscillates (see the docstring)
_MAX_FAILURES = 3  # consecutive broken points that come no closer, after which an example is dropped
_LIKELIEST = 2  # number of classes that are compared near the boundary


@dataclass(frozen=True)
class SuperDeepFool:
    """Finds the smallest change by DeepFool steps that alternate with projections onto the boundary's normal."""

    steps: Steps = 50
    """largest number of steps of both kinds; an example stops when three broken points in a row are no closer than
    before"""
    candidates: Steps = 9
    """number of wrong classes that are compared, likeliest first, until an example is broken; then two are compared"""
    overshoot: Positive = 0.02
    """fraction of the whole change by which a step goes beyond the linear boundary"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L2)
        closest, remaining, x = Closest(batch), batch, batch.x
        with torch.no_grad():
            logits = model(x, batch.ids)
        failures = torch.zeros_like(batch.y)
        for step in range(self.steps + 1):
            broken = firmly_broken(logits, remaining)
            closer = closest.offer(remaining, x, norm.distance(x, remaining.x), broken)
            failures = torch.where(closer, 0, failures + broken)
            active = closest.unsolved(remaining, norm.eps) & (failures < _MAX_FAILURES)
            remaining, x, logits, broken, failures = (
                remaining.take(active),
                x[active],
                logits[active],
                broken[active],
                failures[active],
            )
            if step == self.steps or not len(remaining):
                break
            broken_before, start = closest.found[closest.rows(remaining)], x
            x = start.clone()
            if broken.any():
                x[broken] = _straightened(model, remaining.take(broken), start[broken], norm)
            for rows, classes in ((~broken_before, self.candidates), (broken_before & ~broken, _LIKELIEST)):
                if rows.any():
                    subset = remaining.take(rows)
                    rivals = rivals_of(logits[rows], subset, classes)
                    x[rows] = self._across(model, subset, start[rows], rivals, norm)
            with torch.no_grad():
                logits = model(x, remaining.ids)
        return to_boundary(model, batch, closest.x, norm)

    def _across(self, model: Model, batch: Batch, x: Inputs, rivals: Tensor, norm: Norm) -> Inputs:
        """One step of DeepFool without the features at the sides of the box."""
        margins, grads = planes(model, batch, x, rivals)
        grads = [free(grad, x, model.bounds) for grad in grads]
        return across(norm, model.bounds, batch, x, grads, margins, self.overshoot)


def _straightened(model: Model, batch: Batch, x: Inputs, norm: Norm) -> Inputs:
    """Broken points moved half of the way onto the boundary's normal through the clean input."""
    grad, _ = gradient(model, batch.at(x), margin_loss)
    normal = norm.steepest(grad, batch.x, model.bounds)
    projection = ((x - batch.x) * normal).flatten(1).sum(1)
    upright = batch.x + spread(projection, normal) * normal
    return model.bounds.clamp(torch.lerp(x, upright, _HALF))
