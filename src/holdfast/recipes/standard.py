"""Ordinary training on clean examples with the cross-entropy, as a baseline for the other recipes."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class Standard(LossRecipe):
    """Ordinary training on clean examples, which does not make the model more robust."""

    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of a batch with smoothed labels, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, smoothing=self.label_smoothing)
