"""TRADES: the loss is the clean cross-entropy plus a weighted penalty on the change of the output near each input.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, arXiv:1901.08573. Differs
from the paper: the inner attack starts from a random point of the ball instead of from small Gaussian noise, eps grows
at first, the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.losses import kullback_leibler
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class TRADES(LossRecipe):
    """Adds `beta` times the divergence between clean and attacked predictions to the clean cross-entropy."""

    beta: NonNegative = 6.0
    """weight of the robust term; with 0 the attack is still computed, and changes the statistics of batch norm"""
    steps: Steps = 10
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the divergence between attacked and clean
        prediction.
        """
        return learner.most_divergent(batch, update.rng, kullback_leibler, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the clean cross-entropy plus the weighted divergence, and the number of correct examples."""
        clean, logits = learner.net(batch.x), learner.net(x_adv)
        divergence = learner.mean(kullback_leibler(logits, clean), batch.y)
        clean_loss = learner.mean_cross_entropy(clean, batch.y, smoothing=self.label_smoothing)
        return clean_loss + self.beta * divergence, hits(logits, batch.y)
