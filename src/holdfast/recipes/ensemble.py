"""Ensemble adversarial training: attacks on fixed surrogate models as well as on the network in training.

Tramèr et al., "Ensemble Adversarial Training: Attacks and Defenses", ICLR 2018, arXiv:1705.07204. Adversarial examples
of other networks stay effective when this one learns to mask its own gradient. Differs from the paper: several steps
instead of one, half the weight on clean inputs instead of equal weight, eps grows at first, the weights are averaged,
and the learning rate follows one cycle. It is a defence against transfer.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import SURROGATE, Remedy, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class EnsembleTraining(LossRecipe):
    """Trains on attacks on the network itself and on fixed surrogate models, one of them at random per batch."""

    steps: Steps = 7
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    clean: NonNegative = 0.5
    """weight of the loss on clean inputs, relative to that on attacked ones"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the threat model has no surrogates."""
        if not threat.surrogates:
            raise UsageError(
                "ensemble also attacks surrogates, and none is given", SURROGATE, Remedy("recipe", "pgd")
            )

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy of the trained network
        or of a surrogate model, chosen at random for each batch.
        """
        surrogates = learner.threat.surrogates
        batch_id = torch.zeros(1, dtype=torch.int64, device=batch.x.device)
        chosen = int(update.rng.at("whose").integers(batch_id, len(surrogates) + 1)[0])
        attacked = surrogates[chosen - 1] if chosen else None
        return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach, on=attacked)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy at attacked
        inputs plus the weighted cross-entropy at clean inputs.
        """
        return adversarial_cross_entropy(
            learner, batch, x_adv, clean=self.clean, smoothing=self.label_smoothing
        )
