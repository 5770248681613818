"""Margin training: trains networks with a Lipschitz constant of one for large gaps between logits, which certify
robustness in a ball.

Prach & Lampert, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks", ECCV 2022,
arXiv:2208.03160. Differs from the paper: the offset is in multiples of the margin that certifies the ball of the
threat, instead of the square root of two for every ball; eps grows at first, the weights are averaged, and the learning
rate follows one cycle. Any network can be trained in this way; only one of the layers in
`io/models/lipschitz_layers.py` has the certificate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, NonNegative, Positive
from holdfast.io.models.lipschitz_layers import input_constant
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, clean_inputs, hits, trained


@dataclass(frozen=True)
class MarginTraining:
    """Trains for a large margin: an offset is subtracted from the true class's logit before the cross-entropy."""

    offset: NonNegative = 2.0
    """offset, in multiples of the margin that certifies the ball, which is eps times the square root of two, divided by
    the smallest std of the preprocessing"""
    temperature: Positive = 0.25
    """number by which the logits are divided before the cross-entropy, and by which the loss is multiplied
    afterwards"""
    training: Training = field(default_factory=Training)

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        return trained(
            clean_inputs, self.loss, model, data, threat, self.training, rng=rng, after=after, weighted=True
        )

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
