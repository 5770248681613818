"""Checkpoints: the state of a training after an epoch, from which the training can be resumed exactly."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.core.model import Classifier

WEIGHTS, AVERAGE, MEMORY, STATE = "weights.", "average.", "memory.", "state."
"""prefixes of the names of tensors: weights in training, their running average, state of the optimiser, and state of
the recipe"""
NUMBER, GROUP, EPOCH = "number.", "group.", "epoch."
"""prefixes of the names of tensors: numbers in the state of an optimiser, numbers of its parameter groups, and sums
over the completed part of an epoch"""


def without_prefix(tensors: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    """Return the tensors of a dictionary whose names begin with the prefix `first`, by their names without this
    prefix.
    """
    return {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}


@dataclass(frozen=True)
class TrainingPlan:
    """Plan of a training: the total number of its updates, from which the schedules are computed. It applies from the
    update `at` on, until the next plan.

    The completed fraction of the schedules of learning rate and eps grows linearly from `share` after `at` updates to 1
    after `end` updates.
    """

    at: int
    """number of completed updates when the plan was made"""
    share: float
    """completed fraction of the schedules when the plan was made"""
    end: int
    """total number of updates"""
    review: int
    """number of updates after which the next plan must be made at the latest"""
    spent_s: float = 0.0
    """seconds of the budget that were used when the plan was made"""
    update_s: float = 0.0
    """estimated seconds for one update"""
    look_s: float = 0.0
    """estimated seconds after an epoch, for the evaluation on held-out examples and for writing a checkpoint"""
    rewound: bool = False
    """whether this plan is an earlier one that was moved back to the update from which a guard repeats the training"""
    looked: int = 0
    """number of updates before the last evaluation on held-out examples; 0 if there was none"""

    def done(self, updates: int) -> float:
        """Return the completed fraction of the schedules of learning rate and eps after `updates` updates."""
        return self._along(updates, self.end)

    def rated(self, updates: int) -> float:
        """Return the fraction of the learning rate schedule for the next update. It is one update ahead of the
        completed fraction and does not reach 1.
        """
        return self._along(updates + 1, self.end + 1)

    def _along(self, updates: int, end: int) -> float:
        return (
            self.share + (1 - self.share) * ((updates - self.at) / (end - self.at)) if end > self.at else 1.0
        )


@dataclass(frozen=True)
class Checkpoint:
    """State of a training after an epoch, or within one: all tensors and counts that are needed to continue it exactly,
    including the parameters of the new model.

    Random numbers are counter-based and determine the batches, so that no state of generators or loaders is needed.
    """

    epoch: int
    """number of epochs so far; the last of them may be incomplete"""
    of: int
    """planned number of epochs"""
    tensors: Mapping[str, Tensor]
    """copies of tensors by name: `weights.…`, `average.…` if the weights are averaged, `memory.…` and `state.…`; within
    an epoch also `epoch.…`"""
    measured: Mapping[str, float]
    """measurements of the epoch: `loss` and `accuracy` on the training inputs, the learning rate `lr`, the number
    `forwards` of forward passes for an example, and `dearer`, the cost of an update relative to the first one"""
    part: float = 1.0
    """completed fraction of the last epoch"""
    updates: int = 0
    """number of completed updates"""
    plans: tuple[TrainingPlan, ...] = ()
    """all plans of a training with a time budget, in order; empty if the number of epochs was given"""
    step: int = 0
    """number of completed updates of the epoch after `epoch`; 0 at the end of an epoch"""

    @property
    def share(self) -> float:
        """Completed fraction of the training, on which the schedules of learning rate and eps depend."""
        return self.plans[-1].done(self.updates) if self.plans else self.epoch / self.of

    @property
    def averaged(self) -> bool:
        """Whether the new model has an average of the weights over the training, instead of the last weights."""
        return any(name.startswith(AVERAGE) for name in self.tensors)

    def put_into(self, model: Classifier) -> None:
        """Load the weights of the new model from the checkpoint into a model of the same architecture. The averaged
        weights are used if there are any.
        """
        first = AVERAGE if self.averaged else WEIGHTS
        model.load_state_dict(without_prefix(self.tensors, first))
