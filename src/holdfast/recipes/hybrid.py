"""Hybrid: adversarial training whose labels are mixed with the predictions of the average of its own weights.

Chen, Zhang, Liu, Chang & Wang, "Robust Overfitting May Be Mitigated by Properly Learned Smoothening", ICLR 2021,
combine adversarial training, an average of the weights, and distillation. Differs from the paper: the teacher is the
running average of the weights of the same training instead of networks that were trained before, it predicts the clean
inputs, which gives robust soft labels as in RSLAD (Zi et al., ICCV 2021, arXiv:2108.07969), its share grows during the
warm-up of eps, and the new model is the exponential average of the weights (`training.averaging=swa` for their mean).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.types import Fraction, Inputs, Positive, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import GROWN, Learner, Loop, hits
from holdfast.recipes.training.recipe import LossRecipe
from holdfast.recipes.training.weights import ema

_TEACHER, _UPDATES = "teacher.", "updates"
"""names of state tensors: those of the teacher, and the number of updates"""


@dataclass(frozen=True)
class Hybrid(LossRecipe):
    """Adversarial training, averaged weights, and distillation from the averaged weights."""

    distilled: Fraction = 0.5
    """weight of the teacher's predictions in the labels; the given labels have the rest"""
    memory: Annotated[float, Ge(0), Lt(1)] = 0.99
    """decay of the average of the weights that is the teacher"""
    steps: Steps = 7
    """number of gradient steps of the inner attack"""
    reach: Positive = 2.5
    """path length of the inner attack, in multiples of eps"""
    training: Training = field(default_factory=Training)

    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with the given weights as those of the first teacher."""
        weights = loop.model.state_dict().items()
        teacher = {_TEACHER + name: value.detach().clone() for name, value in weights}
        n_updates = torch.zeros((), dtype=torch.int64, device=loop.data.ids.device)
        return replace(loop, state={**teacher, _UPDATES: n_updates}, settle=self.settle)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the attacked inputs of a batch, found by gradient ascent on the cross-entropy."""
        return learner.worst(batch, update.rng, steps=self.steps, reach=self.reach)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean cross-entropy of attacked inputs with the mixed labels, and the number of correct ones."""
        logits = learner.net(x_adv)
        with torch.no_grad():
            taught = torch.func.functional_call(learner.frozen, _teacher_of(learner), (batch.x,)).softmax(1)
        share = self.distilled * min(float(learner.state[GROWN]), 1.0)
        labels = torch.lerp(F.one_hot(batch.y, logits.shape[1]).to(taught), taught, share)
        return learner.mean_cross_entropy(logits, batch.y, towards=labels), hits(logits, batch.y)

    def settle(self, learner: Learner) -> Callable[[], None]:
        """Return the function that moves the teacher towards the network after each update."""

        def move() -> None:
            updates = learner.state[_UPDATES]
            ema(_teacher_of(learner), learner.net, self.memory, int(updates))
            updates += 1

        return move


def _teacher_of(learner: Learner) -> dict[str, Tensor]:
    return {
        name.removeprefix(_TEACHER): value
        for name, value in learner.state.items()
        if name.startswith(_TEACHER)
    }
