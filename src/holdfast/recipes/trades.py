"""TRADES: clean accuracy, and how little the output changes around it, weighed against each other.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, arXiv:1901.08573.
Differs from the paper: the inner attack starts anywhere in the ball instead of at a tiny Gaussian, the weights are
averaged, and the learning rate goes in one cycle.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Logits, NonNegative, PerExample, Positive, Steps
from holdfast.ops.fit import Training, fit
from holdfast.ops.inner import worst
from holdfast.ops.twin import twin


@dataclass(frozen=True)
class TRADES:
    """Cross-entropy on clean inputs plus `beta` times the worst divergence of the outputs around them."""

    beta: NonNegative = 6.0
    """weight of the robust term; 0 is ordinary training"""
    steps: Steps = 10
    """gradient steps of the inner attack"""
    reach: Positive = 2.5
    """length of its path, in multiples of eps"""
    training: Training = field(default_factory=Training)

    def __call__(
        self,
        model: Classifier,
        data: Batch,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        trained = deepcopy(model).train()
        frozen = twin(trained)

        def loss(batch: Batch, rng: Draws) -> tuple[Tensor, Tensor]:
            clean = trained(batch.x)
            target = clean.detach()

            def apart(logits: Logits, _: Batch) -> PerExample:
                return divergence(logits, target)

            x_adv = worst(frozen, batch, threat, rng, steps=self.steps, reach=self.reach, loss=apart)
            attacked = trained(x_adv)
            value = F.cross_entropy(clean, batch.y) + self.beta * divergence(attacked, clean).mean()
            return value, (attacked.argmax(1) == batch.y).sum()

        return fit(trained, data, loss, self.training, rng=rng, after=after)


def divergence(logits: Logits, clean: Logits) -> PerExample:
    """Kullback-Leibler divergence of the attacked prediction from the clean one, in nats."""
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
