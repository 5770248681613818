"""Jacobian regularisation: training with a penalty on the derivatives of the logits with respect to the input.

Hoffman, Roberts & Yaida, "Robust Learning with Jacobian Regularization", arXiv:1908.02729, 2019. Differs from the
paper: the weights are averaged, and the learning rate follows one cycle. It uses neither eps nor the norm of the
threat, and its gain in robustness is modest.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import gradient_of
from holdfast.core.types import Inputs, Logits, NonNegative, PerExample, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.recipe import LossRecipe

_PLACE = "place"  # state with the seed of an update's projections, the same for every evaluation of the loss


@dataclass(frozen=True)
class JacobianRegularisation(LossRecipe):
    """Adds half of `weight` times the squared Frobenius norm of the Jacobian of the logits to the cross-entropy."""

    weight: NonNegative = 0.01
    """weight of the penalty"""
    projections: Steps = 1
    """number of random directions of the logits from which the norm is estimated; each costs a second backward pass"""
    training: Training = field(default_factory=Training)

    differentiated_twice: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the seed of an update's projections."""
        return replace(loop, state={_PLACE: torch.zeros((), dtype=torch.int64)})

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the clean inputs of a batch, and store the seed of the random directions with which the penalty is
        estimated.
        """
        learner.state[_PLACE].fill_(update.rng.key >> 1)  # the key has 64 bits, and an int64 is signed
        return batch.x

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy plus the
        weighted penalty on the Jacobian of the logits.
        """
        x = x_adv.detach().requires_grad_()
        logits = learner.net(x)
        squared = learner.mean(self.penalty(logits, x, batch, Draws(int(learner.state[_PLACE]))), batch.y)
        return learner.mean_cross_entropy(logits, batch.y) + self.weight / 2 * squared, hits(logits, batch.y)

    def penalty(self, logits: Logits, x: Inputs, batch: Batch, rng: Draws) -> PerExample:
        """Return an unbiased estimate of the squared Frobenius norm of the Jacobian of the logits for each example,
        computed along random directions.
        """
        classes = logits.shape[1]
        towards = rng.normal(batch.ids, self.projections, classes, dtype=logits.dtype)
        towards = towards / towards.norm(dim=2, keepdim=True)
        total = torch.zeros_like(logits[:, 0])
        for unit in towards.unbind(1):
            total = total + gradient_of(logits * unit, x).square().flatten(1).sum(1)
        return classes / self.projections * total
