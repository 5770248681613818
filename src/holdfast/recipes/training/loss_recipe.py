"""Base class of recipes that consist of a loss and of the inputs on which it is computed."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs
from holdfast.recipes.training.fit import Training, Turn
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy, clean_inputs, trained


class LossRecipe:
    """Recipe that trains with the common loop. A subclass is a frozen dataclass with a field `training`. It overrides
    `inner`, `loss`, or both.

    The class variables declare properties of the loss. The settings of `training` that need a property which is not
    declared are refused.
    """

    training: Training
    linear_in_labels: ClassVar[bool] = False
    """whether the loss is linear in the labels (up to terms without a gradient), so that labels can be mixed"""
    differentiated_twice: ClassVar[bool] = False
    """whether the loss contains a gradient, so that a pass is differentiated twice"""
    weights_classes: ClassVar[bool] = False
    """whether `Learner.mean` or `Learner.mean_cross_entropy` averages the losses, with the weights of the classes"""

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        self.check(threat)
        return trained(
            self.inner,
            self.loss,
            model,
            data,
            threat,
            self.training,
            rng=rng,
            after=after,
            linear=self.linear_in_labels,
            slope=self.differentiated_twice,
            weighted=self.weights_classes,
        )

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the recipe cannot train under a threat model with its settings."""

    def inner(self, learner: Learner, batch: Batch, turn: Turn) -> Inputs:
        """Return the inputs on which a batch is trained, which are the clean ones here."""
        return clean_inputs(learner, batch, turn)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch with the training inputs `x_adv`, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv)
