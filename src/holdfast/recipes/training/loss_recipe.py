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
from holdfast.recipes.training.learner import Learner, Loop, adversarial_cross_entropy, clean_inputs, trained
from holdfast.recipes.training.recipe import RecipeFacts


class LossRecipe(RecipeFacts):
    """Recipe that trains with the common loop. A subclass is a frozen dataclass with a field `training`. It overrides
    `inner`, `loss`, or both, and `prepared` if it keeps tensors or needs more than a batch.

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

    uses_unlabelled: ClassVar[bool] = False
    """whether it learns from examples without labels"""
    in_one_process: ClassVar[bool] = False
    """whether it must train in one process, for example because it stores data of all examples"""
    sets_gradients: ClassVar[bool] = False
    """whether `loss` sets the gradients itself; each example is then in a batch with the same probability"""

    def __call__(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Iterator[Checkpoint]:
        return trained(self.loop(model, data, threat, rng=rng, after=after))

    def loop(
        self,
        model: Classifier,
        data: TrainingData,
        threat: ThreatModel,
        *,
        rng: Draws,
        after: Checkpoint | None = None,
    ) -> Loop:
        """Return a training with this recipe. Raises `UsageError` if the recipe does not support it."""
        self.check(threat)
        loop = Loop(
            model,
            data,
            threat,
            self.training,
            rng,
            after,
            self.inner,
            self.loss,
            linear_in_labels=self.linear_in_labels,
            differentiated_twice=self.differentiated_twice,
            weights_classes=self.weights_classes,
            uses_unlabelled=self.uses_unlabelled,
            in_one_process=self.in_one_process,
            sets_gradients=self.sets_gradients,
        )
        return self.prepared(loop)

    def prepared(self, loop: Loop) -> Loop:
        """Return a training with what this recipe adds to it, such as tensors that it keeps from one update to the
        next. Raises `UsageError` if the recipe does not support its settings or its examples.
        """
        return loop

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the recipe cannot train under a threat model with its settings."""

    def inner(self, learner: Learner, batch: Batch, turn: Turn) -> Inputs:
        """Return the inputs on which a batch is trained, which are the clean ones here."""
        return clean_inputs(learner, batch, turn)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch with the training inputs `x_adv`, and the number of correct examples."""
        return adversarial_cross_entropy(learner, batch, x_adv)
