"""CURE (curvature regularisation): training with a penalty on the change of the loss's input gradient over a small
step.

Moosavi-Dezfooli et al., "Robustness via Curvature Regularization, and Vice Versa", CVPR 2019, arXiv:1811.09716. Differs
from the paper: the finite difference is a step of `reach` times eps up the loss in the norm of the threat (under Linf
the paper's direction, the sign of the gradient) instead of one of a fixed length; eps grows at first, the weights are
averaged, and the learning rate follows one cycle.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.gradients import gradient_of, sloped
from holdfast.core.types import Inputs, Labels, Logits, NonNegative, PerExample, Positive
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class CURE(LossRecipe):
    """Adds a penalty on the curvature of the loss: the squared change of its input gradient over a small step."""

    weight: NonNegative = 4.0
    """weight of the penalty"""
    reach: Positive = 1.0
    """length of the step, in multiples of eps"""
    training: Training = field(default_factory=Training)

    differentiated_twice: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus the
        weighted penalty on its curvature.
        """
        constraint, repeated = learner.threat.constraint, learner.repeated_forward()
        losses, grad, right = _slope(learner.net, x_adv, batch.y)
        climb = constraint.steepest(grad.detach(), batch.x, learner.net.bounds)
        # The step may leave the box, as in the paper: the network is defined there too.
        _, grad_after, _ = _slope(
            repeated, torch.add(batch.x, climb, alpha=self.reach * constraint.eps), batch.y
        )
        bend = (grad_after - grad).square().flatten(1).sum(1)
        return learner.mean(losses, batch.y) + self.weight * learner.mean(bend, batch.y), right


def _slope(net: Callable[[Inputs], Logits], x: Inputs, y: Labels) -> tuple[PerExample, Tensor, Tensor]:
    """The cross-entropy of each example, its gradient, and the number of correct examples."""
    x, logits, losses = sloped(net, x, y)
    return losses, gradient_of(losses, x), hits(logits, y)
