"""IBP: certified training on interval bounds of the network, which hold for all inputs of the ball.

Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
arXiv:1810.12715, with the initialisation and the regularisation of Shi et al., "Fast Certified Robust Training with
Short Warmup", NeurIPS 2021, arXiv:2103.17268. Differs from the papers: eps grows linearly, the clean loss keeps a
weight of 0.25 (0.5 or 0 in the papers), the learning rate follows one cycle, the weights are averaged, and batch norm
uses its running statistics in the bounds.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, NonNegative
from holdfast.recipes.training.bounds import BoundedLoss, Initialisation, with_bounds
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.learner import Learner, Loop
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class IBPTraining(LossRecipe):
    """Minimises an upper bound of the loss over all inputs of the ball, computed by interval bound propagation."""

    clean: Fraction = 0.25
    """weight of the loss on clean inputs after the warm-up, during which it falls from 1; the bound has the rest"""
    regularisation: NonNegative = 0.5
    """weight, at the start of the warm-up, of a penalty on wide bounds and on unbalanced activations; it falls to 0"""
    initialisation: Initialisation = "given"
    """weights at the start: those of the given model, or random ones with tight bounds, for networks with batch norm"""
    training: Training = field(default_factory=lambda: Training(lr=2e-3, weight_decay=0.0, warmup=0.3))

    weights_classes: ClassVar[bool] = True
    proves: ClassVar[bool] = True

    @property
    def starts_anew(self) -> bool:
        """Whether the training starts with random weights."""
        return self.initialisation != "given"

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with bounds of the network. Raises `UsageError` for settings without bounds."""
        return with_bounds(loop, self.initialisation, self.bounded_loss, self.clean, self.regularisation)

    def bounded_loss(
        self, bounded: BoundedLoss, learner: Learner, batch: Batch, x_adv: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of examples that the bounds prove to be classified
        correctly.
        """
        return bounded(learner, batch, batch.x, learner.threat.constraint.eps)
