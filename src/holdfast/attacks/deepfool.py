"""DeepFool: repeated steps to the nearest boundary of the linearised classifier.

Moosavi-Dezfooli et al., "DeepFool: A Simple and Accurate Method to Fool Deep Neural Networks", CVPR 2016,
arXiv:1511.04599. Differs from the paper: the classes are ranked once, at the clean input; with a target, the only
boundary is that between the target and the leading class; every step overshoots by a fraction of the whole change and
ends inside the box, and in the second half of the steps features at the sides of the box are left out; a step under L1
is shared by the features with the largest gradient; and it ends with a bisection, which removes the overshoot.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.boundaries import across, planes, rivals_of, to_boundary
from holdfast.attacks.parts.losses import Closest, expect_norm, firmly_broken, free
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps


@dataclass(frozen=True)
class DeepFool:
    """Moves each point repeatedly across the nearest class boundary of the model linearised at this point."""

    steps: Steps = 50
    """largest number of steps; an example stops at its first success"""
    candidates: Steps = 9
    """number of wrong classes that are compared, likeliest first"""
    overshoot: Positive = 0.02
    """fraction of the whole change by which a step goes beyond the linear boundary"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, Linf, L2, L1)
        closest, remaining, x = Closest(batch), batch, batch.x
        with torch.no_grad():
            logits = model(x, batch.ids)
        rivals = rivals_of(logits, batch, self.candidates)
        for step in range(self.steps + 1):
            broken = firmly_broken(logits, remaining)
            closest.offer(remaining, x, norm.distance(x, remaining.x), broken)
            remaining, x, rivals = remaining.take(~broken), x[~broken], rivals[~broken]
            if step == self.steps or not len(remaining):
                break
            margins, grads = planes(model, remaining, x, rivals)
            if not grads:
                break
            if step >= self.steps // 2:
                grads = [free(grad, x, model.bounds) for grad in grads]
            x = across(norm, model.bounds, remaining, x, grads, margins, self.overshoot)
            with torch.no_grad():  # evaluated before the next gradients, which broken examples do not need
                logits = model(x, remaining.ids)
        return to_boundary(model, batch, closest.x, norm)
