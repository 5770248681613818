"""Margin training: trains networks with a Lipschitz constant of one for large gaps between logits, which certify
robustness in a ball.

Prach & Lampert, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks", ECCV 2022,
arXiv:2208.03160. Differs from the paper: the offset is in multiples of the margin that certifies the ball of the
threat, instead of the square root of two for every ball; eps grows at first, the weights are averaged, and the learning
rate follows one cycle. Any network can be trained in this way; only one of the layers in
`io/models/architectures.py` has the certificate.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.types import Inputs, NonNegative, Positive
from holdfast.io.models.architectures import input_constant
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class MarginTraining(LossRecipe):
    """Trains for a large margin: an offset is subtracted from the true class's logit before the cross-entropy."""

    offset: NonNegative = 2.0
    """offset, in multiples of the margin that certifies the ball, which is eps times the square root of two, divided by
    the smallest std of the preprocessing"""
    temperature: Positive = 0.25
    """number by which the logits are divided before the cross-entropy, and by which the loss is multiplied
    afterwards"""
    training: Training = field(default_factory=Training)

    weights_classes: ClassVar[bool] = True

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct examples. The loss is the cross-entropy after an
        offset was subtracted from the logit of the true class.
        """
        logits, constraint = learner.net(x_adv), learner.threat.constraint
        eps = constraint.eps * input_constant(learner.net)  # radius after the preprocessing
        if isinstance(constraint, Linf):
            eps *= math.sqrt(batch.x[0].numel())  # radius of the Euclidean ball around the cube
        label_mask = F.one_hot(batch.y, logits.shape[1]).to(logits)
        lowered = (logits - self.offset * math.sqrt(2) * eps * label_mask) / self.temperature
        return self.temperature * learner.mean_cross_entropy(lowered, batch.y), hits(logits, batch.y)
