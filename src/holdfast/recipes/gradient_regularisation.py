"""Gradient regularisation: training with a penalty on the size of the loss's input gradient, which bounds how fast a
small change of the input raises the loss.

Drucker & Le Cun, "Improving generalization performance using double backpropagation", IEEE Transactions on Neural
Networks 3(6), 1992; for robustness Ross & Doshi-Velez, "Improving the Adversarial Robustness and Interpretability of
Deep Neural Networks by Regularizing Their Input Gradients", AAAI 2018, arXiv:1711.09404; in the dual norm, and by a
finite difference instead of the second backward, Finlay & Oberman, "Scaleable input gradient regularization for
adversarial robustness", arXiv:1905.11468. Differs from the papers: the penalty is the norm itself times eps, the
first-order increase of the loss in an attack, instead of its square, and eps grows at first. It is effective at small
eps; at large eps the gradient at the input predicts little.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.gradients import gradient_of, rise, sloped
from holdfast.core.types import Inputs, Logits, NonNegative, PerExample, Positive
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class GradientRegularisation(LossRecipe):
    """Adds a penalty on the input gradient: `weight` times the first-order increase of the loss in a step of eps."""

    weight: NonNegative = 3.0
    """weight of the penalty; with 1, the sum is a first-order approximation of the loss after a step of eps"""
    method: Literal["double-backprop", "finite-difference"] = "double-backprop"
    """how the penalty is computed: by a second backward pass, or by the loss after a short step"""
    reach: Positive = 0.1
    """length of the step of the finite difference, in multiples of eps"""
    training: Training = field(default_factory=Training)

    differentiated_twice: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus the
        weighted penalty on its input gradient.
        """
        repeated = learner.repeated_forward()
        x, logits, losses = sloped(learner.net, x_adv, batch.y)
        if self.method == "double-backprop":
            penalty = rise(losses, x, learner.threat.constraint, learner.net.bounds)
        else:
            penalty = self._increase(learner, batch, x, losses, repeated) / self.reach
        return learner.mean(losses + self.weight * penalty, batch.y), hits(logits, batch.y)

    def _increase(
        self,
        learner: Learner,
        batch: Batch,
        x: Inputs,
        losses: PerExample,
        repeated: Callable[[Inputs], Logits],
    ) -> PerExample:
        """Increase of the loss in a short step."""
        constraint = learner.threat.constraint
        climb = constraint.steepest(gradient_of(losses, x, graph=False), batch.x, learner.net.bounds)
        logits = repeated(torch.add(batch.x, climb, alpha=self.reach * constraint.eps))
        return F.cross_entropy(logits, batch.y, reduction="none") - losses
