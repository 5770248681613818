"""Friendly adversarial training: the attack on each example stops soon after its success, and stops later as the
training proceeds.

Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", ICML 2020, arXiv:2002.11242
(friendly adversarial training, FAT): among the adversarial examples, train on those with the smallest loss. Training
that begins with weak attacks is from Cai et al., "Curriculum Adversarial Training", IJCAI 2018, arXiv:1805.04807, who
raise the number of steps. Differs from the papers: the number of steps after a success grows linearly over the training
instead of at chosen epochs; eps grows at first, the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.types import Count, Fraction, Inputs, Logits, Positive, Rows, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class CurriculumTraining(LossRecipe):
    """Trains on attacks that stop for each example at its first misclassification or a few steps later."""

    beyond: Count = 3
    """number of steps that an example takes after its first error, at the end of the training; it grows from 0"""
    steps: Steps = 10
    """largest number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of all steps, in multiples of eps"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy that stops for each
        example some steps after its first misclassification.
        """
        constraint, model = learner.threat.constraint, learner.frozen
        x_adv = constraint.sample(batch, model.bounds, update.rng.at("start"))
        active = torch.arange(len(batch), device=batch.x.device)
        steps_left = torch.full_like(active, int((self.beyond + 1) * update.done))
        for _ in range(self.steps):
            grad, logits = self._slope(learner, batch.at(x_adv), active)
            wrong = logits.argmax(1) != batch.y[active]
            continues = ~wrong | (steps_left > 0)
            if not continues.any():
                break
            active, steps_left = active[continues], (steps_left - wrong.long())[continues]
            remaining, x = batch.take(active), x_adv[active]
            climb = constraint.steepest(grad[continues], x, model.bounds)
            stepped = torch.add(x, climb, alpha=self.reach * constraint.eps / self.steps)
            x_adv = x_adv.index_copy(0, active, constraint.project(stepped, remaining.x, model.bounds))
        return x_adv

    def _slope(self, learner: Learner, batch: Batch, active: Rows) -> tuple[Inputs, Logits]:
        """Gradients and logits of the rows `active`; the whole batch is used if batch norm uses its statistics."""
        if self.training.attack_statistics == "batch":
            grad, logits = gradient(learner.frozen, batch, cross_entropy)
            return grad[active], logits[active]
        return gradient(learner.frozen, batch.take(active), cross_entropy)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy at the attacked inputs of a batch, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, smoothing=self.label_smoothing)
