"""Ordinary training: the cross-entropy of the labels, which is what every recipe is compared with."""

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
from holdfast.ops.fit import Training, fit


@dataclass(frozen=True)
class Standard:
    """Train on the examples as they are; nothing is made harder to break."""

    label_smoothing: float = 0.0
    """share of each label that is spread over all classes"""
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

        def loss(batch: Batch, rng: Draws) -> tuple[Tensor, Tensor]:
            logits = trained(batch.x)
            smooth = F.cross_entropy(logits, batch.y, label_smoothing=self.label_smoothing)
            return smooth, (logits.argmax(1) == batch.y).sum()

        return fit(trained, data, loss, self.training, rng=rng, after=after)
