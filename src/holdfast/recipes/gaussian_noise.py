"""Training with Gaussian noise, which prepares a network for randomised smoothing.

Cohen, Rosenfeld & Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, arXiv:1902.02918,
section 4: the cross-entropy at noisy inputs, which is a lower bound of the logarithm of the smoothed classifier's
probability of the label (up to its sign). With `stability`, the divergence between the mean prediction of several
noisy copies and each of them is added: Jeong & Shin, "Consistency Regularization for Certified Robustness of Smoothed
Classifiers", NeurIPS 2020, arXiv:2006.04062. Differs from the papers: the noise grows with the warm-up of `training`,
the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from holdfast.certifiers.smoothing import numbered_noise
from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, NonNegative
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class GaussianNoise(LossRecipe):
    """Trains on inputs with Gaussian noise, as randomised smoothing with the same `sigma` needs."""

    sigma: NonNegative = 0.25
    """standard deviation of the noise, in units of the inputs; smoothing certifies best with the same value"""
    copies: Annotated[int, Ge(1)] = 1
    """number of noisy copies of each example in a batch"""
    stability: NonNegative = 0.0
    """weight of the divergence between the mean prediction of the copies and each of them; it needs several copies"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training, whose divergence is not linear in the labels."""
        return replace(loop, linear_in_labels=not self.stability)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the noisy copies of a batch, (copies n, *features), which are not clipped to the valid range."""
        x, ids = batch.x.repeat(self.copies, *[1] * (batch.x.dim() - 1)), batch.ids.repeat(self.copies)
        copy = torch.arange(self.copies, device=ids.device).repeat_interleave(len(batch))
        return x + update.grown * self.sigma * numbered_noise(update.rng.at("noise"), ids, copy, x)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, and the number of its first noisy copies that are classified correctly."""
        logits = learner.net(x_adv)
        y = batch.y.repeat(self.copies)
        loss = learner.mean_cross_entropy(logits, y, smoothing=self.label_smoothing)
        if self.stability and self.copies > 1:
            of_copies = logits.log_softmax(1).view(self.copies, len(batch), -1)
            mean = of_copies.exp().mean(0).clamp_min(torch.finfo(logits.dtype).tiny)
            divergence = learner.mean((mean * (mean.log() - of_copies)).sum(2).flatten(), y)
            loss = loss + self.stability * divergence
        return loss, hits(logits[: len(batch)], batch.y)
