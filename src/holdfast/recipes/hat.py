"""HAT (helper-based adversarial training): TRADES with an additional loss at points outside the ball, whose labels are
the predictions of the original model.

Rade & Moosavi-Dezfooli, "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off", ICLR 2022
(helper-based adversarial training). Differs from the paper: the model that is to be hardened is the helper, the inner
attack starts from a random point of the ball instead of from small Gaussian noise, eps grows at first, the weights are
averaged, and the learning rate follows one cycle.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.losses import kullback_leibler
from holdfast.recipes.training.recipe import LossRecipe

_N_TESTED, _MIN_ACCURACY = (
    1_000,
    0.5,
)  # number of examples on which the helper is tested, and the accuracy that it needs


@dataclass(frozen=True)
class HAT(LossRecipe):
    """Adds to TRADES a loss at points outside the ball, whose labels are the predictions of the original model."""

    beta: NonNegative = 2.5
    """weight of the divergence"""
    gamma: NonNegative = 0.5
    """weight of the cross-entropy with the predictions of the original model (the helper) as labels"""
    beyond: Positive = 2.0
    """factor by which the change of the attack is enlarged at the points where the helper's predictions are
    the labels"""
    steps: Steps = 10
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the given model as the helper."""
        helper = deepcopy(loop.model).eval().requires_grad_(False)
        _refuse_untaught(helper, loop.data)
        return replace(loop, loss=partial(self.helped_loss, helper=helper))

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the divergence between attacked and clean
        prediction.
        """
        return learner.most_divergent(batch, update.rng, kullback_leibler, steps=self.steps, reach=self.reach)

    def helped_loss(
        self, learner: Learner, batch: Batch, x_adv: Inputs, *, helper: Classifier
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, which is the sum of the three terms of the recipe, and the number of correct
        examples.

        The terms are the clean cross-entropy, the divergence at `x_adv`, and the cross-entropy at points beyond `x_adv`
        with the predictions of `helper` as labels.
        """
        with torch.no_grad():
            labels = helper(x_adv).argmax(1)
        further = torch.lerp(batch.x, x_adv, self.beyond)
        clean, logits, further_logits = learner.net(batch.x), learner.net(x_adv), learner.net(further)
        divergence = learner.mean(kullback_leibler(logits, clean), batch.y)
        helper_loss = learner.mean_cross_entropy(further_logits, batch.y, towards=labels)
        value = learner.mean_cross_entropy(clean, batch.y) + self.beta * divergence + self.gamma * helper_loss
        return value, hits(logits, batch.y)


def _refuse_untaught(helper: Classifier, data: TrainingData) -> None:
    sample = data.take(torch.arange(min(_N_TESTED, len(data)), device=data.ids.device))
    with torch.no_grad():
        right = (helper(sample.x).argmax(1) == sample.y).double().mean().item()
    if right < _MIN_ACCURACY:
        raise UsageError(
            f"hat learns from the given model, which classifies {right:.0%} of {len(sample):,} training examples "
            "correctly; train it first, with the recipe standard",
            Remedy("recipe", "trades"),
        )
