"""Ordinary training on clean examples with the cross-entropy, as a baseline for the other recipes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy, clean_inputs, trained


@dataclass(frozen=True)
class Standard:
    """Ordinary training on clean examples, which does not make the model more robust."""

    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
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
            clean_inputs,
            self.loss,
            model,
            data,
            threat,
            self.training,
            rng=rng,
            after=after,
            linear=True,
            weighted=True,
        )

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of a batch with smoothed labels, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv, smoothing=self.label_smoothing)
