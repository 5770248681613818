"""Free adversarial training: one backward pass updates both the weights and the perturbation.

Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, arXiv:1904.12843: each batch is replayed a few times,
and the perturbation continues from replay to replay and from batch to batch, so that an update costs one forward and
one backward, as in ordinary training. Differs from the paper: any norm, eps grows at first, the weights are averaged,
the learning rate follows one cycle, a pass over the data counts as one epoch for any number of replays, and a feature
that was clipped to the box has a gradient that leads back into it, which the paper's code drops.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.model import Bounds
from holdfast.core.types import Fraction, Inputs, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe

_DELTA = "delta"
_EVERYWHERE = Bounds(-math.inf, math.inf)  # the perturbation is not clipped: it is used on other images


@dataclass(frozen=True)
class FreeTraining(LossRecipe):
    """Adversarial training that updates weights and perturbation with the gradient of the same backward pass."""

    replays: Steps = 8
    """number of consecutive updates on each batch"""
    step: Positive = 1.0
    """step size of the perturbation in each update, in multiples of eps"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    in_one_process: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training, with a perturbation that continues from batch to batch."""
        delta = torch.zeros_like(loop.data.first(self.training.batch).x)
        return replace(loop, state={_DELTA: delta}, replays=self.replays)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs of a batch with the current perturbation, which a hook updates during the backward pass of
        the training loss.
        """
        perturbed = batch.x + learner.state[_DELTA]
        x_adv = learner.net.bounds.clamp(perturbed).requires_grad_()
        cut = perturbed - x_adv.detach()
        # a hook, because another gradient would cost a second backward pass
        x_adv.register_hook(partial(self._update_delta, learner, x_adv.detach(), cut))  # type: ignore[no-untyped-call]
        return x_adv

    def _update_delta(self, learner: Learner, x_adv: Inputs, cut: Inputs, grad: Inputs) -> None:
        """Update the perturbation along the gradient inside its ball; features with a `cut` move only into the box."""
        constraint, delta = learner.threat.constraint, learner.state[_DELTA]
        climb = constraint.steepest(grad.masked_fill(grad * cut > 0, 0), x_adv, learner.net.bounds)
        stepped = torch.add(delta, climb, alpha=self.step * constraint.eps)
        # in place, because this tensor is part of the checkpoints
        delta.copy_(constraint.project(stepped, torch.zeros_like(delta), _EVERYWHERE))

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy at the attacked inputs of a batch, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, smoothing=self.label_smoothing)
