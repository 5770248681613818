"""JSMA (Jacobian-based saliency map attack): changes the few input values with the largest saliency to their lowest or
highest valid value.

Papernot et al., "The Limitations of Deep Learning in Adversarial Settings", EuroS&P 2016, arXiv:1511.07528; of historic
interest: `SigmaZero` finds a fraction of the changes. On probabilities, whose sum is one, the other classes'
derivatives are minus the target's, so that the best pair of the paper's map has the two largest derivatives, and no
pairs need to be searched. Differs from the paper: without a target the label's probability is lowered, and values move
in both directions, as in Wiyatno & Xu, "Maximal Jacobian-based Saliency Map Attack", 2018, arXiv:1808.07945; and it
ends by undoing the changes that are not needed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import Closest, cross_entropy, expect_norm, firmly_broken, free
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps


@dataclass(frozen=True)
class JSMA:
    """Changes the two values with the largest saliency in each step, until the example is misclassified."""

    steps: Steps = 100
    """largest number of steps; an example stops at its first success"""
    values: Steps = 2
    """number of values (or pixels) that a step changes"""
    theta: Positive = 1.0
    """size of the change of a value, as a fraction of the width of its box"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, L0)
        assert isinstance(norm, L0)
        closest, remaining, x = Closest(batch), batch, batch.x
        low, high = model.bounds.like(x)
        for step in range(self.steps + 1):
            grad, logits = gradient(model, remaining.at(x), cross_entropy)
            broken = firmly_broken(logits, remaining)
            closest.offer(remaining, x, norm.distance(x, remaining.x), broken)
            remaining, x, grad = remaining.take(~broken), x[~broken], free(grad, x, model.bounds)[~broken]
            if step == self.steps or not len(remaining):
                break
            changed = model.bounds.clamp(x + self.theta * (high - low) * grad.sign())
            salient = norm.largest(grad * (changed - x), torch.full_like(x.flatten(1)[:, 0], self.values))
            x = torch.where(salient, changed, x)
        return to_boundary(model, batch, closest.x, norm)
