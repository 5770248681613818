"""SABR (small adversarial bounding regions): certified training on interval bounds over a small box around an attacked
point, inside the ball.

Müller et al., "Certified Training: Small Boxes are All You Need", ICLR 2023, arXiv:2210.04871. The boxes do not cover
the ball, so that the loss is no upper bound, but the network is less regularised than by bounds over the whole ball;
its certificates need tighter bounds than intervals, such as those of branch and bound. Differs from the paper: eps
grows linearly while the weight of the clean loss falls to 0, the learning rate follows one cycle, the weights are
averaged, batch norm uses its running statistics in the bounds, and no ReLU is shrunk.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.recipes.training.bounds import BoundedLoss, Initialisation, with_bounds
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class SABR(LossRecipe):
    """Minimises an upper bound of the loss over a small box around an attacked point of the ball."""

    ratio: Fraction = 0.3
    """radius of the box as a fraction of eps (lambda of the paper): with 1 it is the ball, with 0 the attacked point"""
    clean: Fraction = 0.0
    """weight of the loss on clean inputs after the warm-up, during which it falls from 1; the bound has the rest"""
    steps: Steps = 2
    """number of gradient steps of the inner attack, which searches the centre of the box"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of the distance of the centre from the example"""
    regularisation: NonNegative = 0.0
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

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the centres of the boxes: attacked inputs within the ball that remains without the radius of a box."""
        constraint = learner.threat.constraint
        smaller = constraint.resized((1 - self.ratio) * constraint.eps)
        nearer = replace(learner, threat=replace(learner.threat, constraint=smaller))
        return nearer.worst(batch, update.rng, steps=self.steps, reach=self.reach)

    def bounded_loss(
        self, bounded: BoundedLoss, learner: Learner, batch: Batch, x_adv: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of examples that the bounds prove to be classified
        correctly in their boxes.
        """
        return bounded(learner, batch, x_adv, self.ratio * learner.threat.constraint.eps)
