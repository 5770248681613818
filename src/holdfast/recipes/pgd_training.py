"""PGD adversarial training: the loss is the cross-entropy at the result of a projected gradient attack on each example.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083: robust
optimisation, the minimum over weights of the mean over examples of the maximum over the ball. Differs from the paper:
eps grows at first, the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class PGDTraining(LossRecipe):
    """Adversarial training on the results of a short projected gradient attack on each batch."""

    steps: Steps = 7
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    clean: NonNegative = 0.0
    """weight of the loss on clean inputs, relative to that on attacked ones"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy."""
        return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy at attacked
        inputs plus the weighted cross-entropy at clean inputs.
        """
        return adversarial_cross_entropy(
            learner, batch, x_adv, clean=self.clean, smoothing=self.label_smoothing
        )
