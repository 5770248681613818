"""SCORE: TRADES with a squared distance of predictions instead of a divergence.

Pang et al., "Robustness and Accuracy Could Be Reconcilable by (Proper) Definition", ICML 2022, arXiv:2202.10103.
Differs from the paper: eps grows at first, the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.losses import squared_error
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class SCORE(LossRecipe):
    """Replaces the cross-entropy and the divergence of TRADES by squared distances between predictions."""

    beta: NonNegative = 4.0
    """weight of the robust term"""
    forgiven: NonNegative = 0.0
    """squared distance below which the robust term is zero, since labels are uncertain"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    steps: Steps = 10
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the squared distance between attacked and
        clean prediction.
        """
        return learner.most_divergent(batch, update.rng, squared_error, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch, which is the weighted sum of two squared distances, and the number of
        correct examples.
        """
        clean, logits = learner.net(batch.x), learner.net(x_adv)
        label = F.one_hot(batch.y, clean.shape[1]).to(clean)
        label = torch.lerp(label, torch.full_like(label, 1 / clean.shape[1]), self.label_smoothing)
        error = (clean.softmax(1) - label).square().sum(1)
        robust = (squared_error(logits, clean) - self.forgiven).clamp_min(0)
        return learner.mean(error + self.beta * robust, batch.y), hits(logits, batch.y)
