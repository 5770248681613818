"""The state of a training after an epoch: a recipe yields it, a run saves it, and a resumed run loads it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.core.model import Classifier

WEIGHTS, AVERAGE, MEMORY, STATE = "weights.", "average.", "memory.", "state."
"""Prefixes of tensor names: the weights in training, their running average, the optimiser's state, and the recipe's
state."""


def without_prefix(tensors: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    """The tensors whose names have the prefix `first`, by name without the prefix."""
    return {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}


@dataclass(frozen=True)
class TrainingPlan:
    """Number of updates of a training, planned after `at` of them; an update follows the last plan before it.

    The schedules of the learning rate and of eps go linearly from `share` after `at` updates to 1 after `end`.
    """

    at: int
    """number of completed updates when the plan was made"""
    share: float
    """completed share of the schedules when the plan was made"""
    end: int
    """total number of updates"""
    review: int
    """number of updates after which the next plan is made at the latest"""
    spent_s: float = 0.0
    """used seconds of the budget"""
    update_s: float = 0.0
    """estimated seconds of an update"""
    look_s: float = 0.0
    """estimated seconds after an epoch, for the evaluation on held-out examples and for writing a checkpoint"""
    rewound: bool = False
    """whether this is the previous plan, moved back to where a guard restarted the training"""

    def done(self, updates: int) -> float:
        """Completed share of the schedules after this number of updates."""
        return self._along(updates, self.end)

    def rated(self, updates: int) -> float:
        """The same for the learning rate, which starts one update later and does not reach 1."""
        return self._along(updates + 1, self.end + 1)

    def _along(self, updates: int, end: int) -> float:
        return (
            self.share + (1 - self.share) * ((updates - self.at) / (end - self.at)) if end > self.at else 1.0
        )


@dataclass(frozen=True)
class Checkpoint:
    """All tensors and counts for an exact continuation of a training; the new model is one of them.

    Random numbers are counter-based and batches follow from them, so that no state of generators or loaders is needed.
    """

    epoch: int
    """number of completed epochs; the last one may be incomplete"""
    of: int
    """planned number of epochs"""
    tensors: Mapping[str, Tensor]
    """copies by name: `weights.…`, `average.…` if the weights are averaged, `memory.…` and `state.…`"""
    measured: Mapping[str, float]
    """measurements of the epoch: `loss` and `accuracy` on the training inputs, the learning rate `lr`, the `forwards`
    of an example through the network, and the cost of an update relative to the first one as `dearer`"""
    part: float = 1.0
    """completed share of the last epoch"""
    updates: int = 0
    """number of completed updates"""
    plans: tuple[TrainingPlan, ...] = ()
    """all plans of a training with a time budget, in order; empty if the number of epochs was given"""

    @property
    def share(self) -> float:
        """Completed share of the schedules of learning rate and eps."""
        return self.plans[-1].done(self.updates) if self.plans else self.epoch / self.of

    @property
    def averaged(self) -> bool:
        """Whether the new model is an average of weights during the training."""
        return any(name.startswith(AVERAGE) for name in self.tensors)

    def put_into(self, model: Classifier) -> None:
        """Load the new weights into a model of the same architecture."""
        first = AVERAGE if self.averaged else WEIGHTS
        model.load_state_dict(without_prefix(self.tensors, first))
