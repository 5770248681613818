"""LLR (local linearity regularisation): training for a loss that is nearly linear and has a small slope in the whole
ball.

Qin et al., "Adversarial Robustness through Local Linearization", NeurIPS 2019, arXiv:1907.02610. Differs from the
paper: the search uses the threat's steepest steps instead of Adam's, eps grows at first, the weights are averaged,
and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch, spread
from holdfast.core.gradients import gradient_of, sloped
from holdfast.core.types import Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class LLR(LossRecipe):
    """Trains for a loss that is nearly linear in the ball, by a penalty on its largest distance from its tangent."""

    bend: NonNegative = 4.0
    """weight of the largest distance between the loss and its tangent"""
    slope: NonNegative = 3.0
    """weight of the absolute change of the tangent at the same point"""
    steps: Steps = 2
    """number of gradient steps of the search for the point with the largest distance"""
    reach: Positive = 2.5
    """path length of the search, in multiples of eps"""
    training: Training = field(default_factory=Training)

    differentiated_twice: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs at which the penalty is measured: points of the ball, found by gradient ascent on the
        distance between the loss and its linear approximation.
        """
        constraint, net, bounds = learner.threat.constraint, learner.frozen, learner.frozen.bounds
        tangent, logits = gradient(net, batch, cross_entropy)
        level = cross_entropy(logits, batch)
        x = constraint.sample(batch, bounds, update.rng.at("start"))
        for _ in range(self.steps):
            grad, logits = gradient(net, batch.at(x), cross_entropy)
            deviation = cross_entropy(logits, batch) - level - (tangent * (x - batch.x)).flatten(1).sum(1)
            climb = constraint.steepest(spread(deviation.sign(), x) * (grad - tangent), x, bounds)
            stepped = torch.add(x, climb, alpha=self.reach * constraint.eps / self.steps)
            x = constraint.project(stepped, batch.x, bounds)
        return x

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus
        penalties on its non-linearity and on its slope, measured at `x_adv`.
        """
        repeated = learner.repeated_forward()
        x, logits, losses = sloped(learner.net, batch.x, batch.y)
        tangent_change = (gradient_of(losses, x) * (x_adv - batch.x)).flatten(1).sum(1)
        losses_at_point = F.cross_entropy(repeated(x_adv), batch.y, reduction="none")
        deviation = (losses_at_point - losses - tangent_change).abs()
        return learner.mean(
            losses + self.bend * deviation + self.slope * tangent_change.abs(), batch.y
        ), hits(logits, batch.y)
