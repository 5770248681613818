"""Where a training stands after an epoch: what a recipe yields, a run keeps, and a later run goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdfast.core.model import Classifier

WEIGHTS, AVERAGE, MEMORY, STATE = "weights.", "average.", "memory.", "state."
"""How the names of tensors begin: the network as it is trained, its running average, what the optimiser remembers, and
what the recipe does."""


def beginning(tensors: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}


@dataclass(frozen=True)
class TrainingPlan:
    """How many updates a training has, planned after `at` of them; the last plan that was made decides an update.

    The schedules of the learning rate and of eps go evenly from `share` after `at` updates to 1 after `end`.
    """

    at: int
    """updates that were done"""
    share: float
    """share of the schedules that was done"""
    end: int
    """updates in all"""
    review: int
    """updates after which the next plan is made, at the latest"""
    spent_s: float = 0.0
    """seconds of the budget that were spent"""
    update_s: float = 0.0
    """estimated seconds of an update"""
    look_s: float = 0.0
    """estimated seconds of what follows an epoch: a look at held-out examples, and a checkpoint that is written"""
    rewound: bool = False
    """whether it is the plan before, moved back to where a guard had the training start again"""

    def done(self, updates: int) -> float:
        """Share of the schedules that is done after so many updates."""
        return self._along(updates, self.end)

    def rated(self, updates: int) -> float:
        """The same for the learning rate, which begins one update later and never comes to its end."""
        return self._along(updates + 1, self.end + 1)

    def _along(self, updates: int, end: int) -> float:
        return (
            self.share + (1 - self.share) * ((updates - self.at) / (end - self.at)) if end > self.at else 1.0
        )


@dataclass(frozen=True)
class Checkpoint:
    """Everything that going on from here exactly needs, and with it the new model.

    Draws are counter-based and batches follow from them, so that no state of a generator or a loader is part of it.
    """

    epoch: int
    """epochs that are done; the last one may be a part"""
    of: int
    """epochs in all, as far as it is planned"""
    tensors: Mapping[str, Tensor]
    """by name, each a copy: `weights.…`, `average.…` where the weights are averaged, `memory.…` and `state.…`"""
    measured: Mapping[str, float]
    """what the epoch says of itself: `loss` and `accuracy` on what was trained on, the learning rate `lr`, the
    `forwards` of an example through the network that is trained, and how many times `dearer` an update has become"""
    part: float = 1.0
    """share of the last epoch that was trained"""
    updates: int = 0
    """updates that are done"""
    plans: tuple[TrainingPlan, ...] = ()
    """all that were made within a budget of time, in their order; none where the epochs were given"""

    @property
    def share(self) -> float:
        """Share of the schedules of rate and eps that is done."""
        return self.plans[-1].done(self.updates) if self.plans else self.epoch / self.of

    @property
    def averaged(self) -> bool:
        """Whether the new model is an average of the weights on the way."""
        return any(name.startswith(AVERAGE) for name in self.tensors)

    def put_into(self, model: Classifier) -> None:
        """Give a model of the same architecture the new weights."""
        first = AVERAGE if self.averaged else WEIGHTS
        model.load_state_dict(beginning(self.tensors, first))
