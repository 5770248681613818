"""MART (misclassification-aware adversarial training): examples that are misclassified when clean get a larger weight
in the loss.

Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020. Differs from the
paper: the inner attack starts from a random point of the ball instead of from small Gaussian noise, eps grows at first,
the weights are averaged, and the learning rate follows one cycle. PGD overestimates its robust accuracy: under
AutoAttack it is below plain adversarial training in published tables.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.losses import kullback_leibler
from holdfast.recipes.training.recipe import LossRecipe

_ABOVE_ONE = 1.0001  # as in the authors' code, so that the argument of the logarithm is positive


@dataclass(frozen=True)
class MART(LossRecipe):
    """Adversarial training that gives larger weights to examples that are misclassified when clean."""

    beta: NonNegative = 6.0
    """weight of the divergence"""
    steps: Steps = 10
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    training: Training = field(default_factory=Training)

    weights_classes: ClassVar[bool] = True

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy."""
        return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the boosted cross-entropy
        plus the weighted divergence between attacked and clean prediction.
        """
        clean, logits = learner.net(batch.x), learner.net(x_adv)
        label = batch.y[:, None]
        rival = logits.softmax(1).scatter(1, label, 0.0).amax(1)
        boosted = F.cross_entropy(logits, batch.y, reduction="none") - torch.log(_ABOVE_ONE - rival)
        error = 1 - clean.softmax(1).gather(1, label)[:, 0]
        value = boosted + self.beta * error * kullback_leibler(logits, clean)
        return learner.mean(value, batch.y), hits(logits, batch.y)
