"""Unlearning of a trigger: a network with a backdoor is trained further on clean inputs, a part of which get the
trigger and keep their true labels.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section
VI.C. Differs from the paper: half of the inputs get the trigger instead of a fifth, over ten epochs instead of one.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.estimate import Goal
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.follow_up import after_repair, trigger_of
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.recipe import Finished, LossRecipe


@dataclass(frozen=True)
class Repair(LossRecipe):
    """Trains on clean inputs, of which a part get the trigger of the threat model and keep their true labels."""

    stamped: Fraction = 0.5
    """fraction of the inputs that get the trigger"""
    control: str = ""
    """network that was never poisoned, as in `clean.pt,arch=net.py:make`, which only a drill has: after the training
    it gets the same updates with poisoned examples as the new model"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=10, batch=64, lr=5e-4, schedule="flat", weight_decay=0.0, averaging="none"
        )
    )

    goal: ClassVar[Goal] = Goal("trigger_success_rate", better="lower")
    linear_in_labels: ClassVar[bool] = True
    weights_classes: ClassVar[bool] = True

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the threat model is not a trigger."""
        trigger_of(threat)

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs of a batch, of which a part that is drawn at random has the trigger."""
        stamped = trigger_of(learner.threat).stamped(batch.x, learner.net.bounds)
        drawn = update.rng.at("stamped").uniform(batch.ids) < self.stamped
        return torch.where(drawn.view(-1, *[1] * (batch.x.ndim - 1)), stamped, batch.x)

    def follow_up(self, finished: Finished) -> tuple[dict[str, Any], str]:
        """Return the success of the trigger before and after the repair, and after further poisoned updates."""
        return after_repair(finished)
