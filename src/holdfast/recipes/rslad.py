"""RSLAD: a network learns the predictions of a robust teacher for clean inputs, at clean and at attacked inputs.

Zi, Zhao, Ma & Jiang, "Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better", ICCV
2021, arXiv:2108.07969. No label is used. Differs from the paper: the inner attack starts from a random point of the
ball instead of from small Gaussian noise, eps grows at first, the weights are averaged, and the learning rate follows
one cycle.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.types import Fraction, Inputs, Logits, Positive, Steps
from holdfast.recipes.training.fit import UNWRITTEN, Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.losses import kullback_leibler
from holdfast.recipes.training.recipe import LossRecipe


class SoftLabels:
    """Function from inputs to the logits of a fixed teacher. The last result is stored, because the attack on a batch
    and its loss need the same one. Cost: a forward pass of the teacher for each batch.
    """

    def __init__(self, teacher: Classifier) -> None:
        self._teacher = deepcopy(teacher).eval().requires_grad_(False)
        self._inputs: Inputs | None = None
        self._logits: Logits | None = None

    def __call__(self, x: Inputs) -> Logits:
        """Return the logits of the teacher for inputs, without a gradient."""
        if self._inputs is not x or self._logits is None:
            with torch.no_grad():
                self._inputs, self._logits = x, self._teacher(x)
        return self._logits


@dataclass(frozen=True)
class RSLAD(LossRecipe):
    """Trains on the divergence from the predictions of a robust teacher, at clean and at attacked inputs."""

    teacher: str = ""
    """robust network with the same classes, as in `robust.safetensors,arch=net.py:make`, with the grammar of a
    surrogate"""
    alpha: Fraction = 5 / 6
    """weight of the divergence at attacked inputs; that at clean ones has the rest"""
    steps: Steps = 10
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    training: Training = field(default_factory=Training)
    opened: Classifier | None = field(default=None, repr=False, metadata=UNWRITTEN)
    """the opened teacher; it is set by `harden`"""

    def taught_by(self, teacher: Classifier) -> Self:
        """Return the same recipe with the opened teacher."""
        return replace(self, opened=teacher)

    needs_teacher: ClassVar[bool] = True
    linear_in_labels: ClassVar[bool] = True
    uses_unlabelled: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the predictions of the teacher. Raises `UsageError` without a teacher."""
        if self.opened is None:
            raise UsageError(
                "rslad learns from a robust teacher, and none is given",
                Remedy("recipe.teacher", Placeholder("MODEL", "MODEL")),
                Remedy("recipe", "pgd"),
            )
        labels = SoftLabels(self.opened)
        return replace(
            loop,
            inner=partial(self.attacked, labels=labels),
            loss=partial(self.taught_loss, labels=labels),
        )

    def attacked(self, learner: Learner, batch: Batch, update: Update, *, labels: SoftLabels) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the divergence from the teacher's
        prediction for the clean inputs.
        """
        taught = labels(batch.x)
        return learner.worst(
            replace(batch, y=taught.argmax(1)),  # an example may have no label
            update.rng,
            steps=self.steps,
            reach=self.reach,
            loss=lambda logits, _: kullback_leibler(logits, taught),
        )

    def taught_loss(
        self, learner: Learner, batch: Batch, x_adv: Inputs, *, labels: SoftLabels
    ) -> tuple[Tensor, Tensor]:
        """Return the mean weighted divergence from the teacher's predictions for the clean inputs, and the number of
        correct attacked inputs.
        """
        taught, logits = labels(batch.x), learner.net(x_adv)
        value = self.alpha * kullback_leibler(logits, taught).mean()
        if self.alpha < 1:
            value = value + (1 - self.alpha) * kullback_leibler(learner.net(batch.x), taught).mean()
        return value, hits(logits, batch.y)
