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
class Checkpoint:
    """Everything that going on from here exactly needs, and with it the new model.

    Draws are counter-based and batches follow from them, so that no state of a generator or a loader is part of it.
    """

    epoch: int
    """epochs that are done"""
    of: int
    """epochs in all"""
    tensors: Mapping[str, Tensor]
    """by name, each a copy: `weights.…`, `average.…` where the weights are averaged, `memory.…` and `state.…`"""
    measured: Mapping[str, float]
    """what the epoch says of itself: `loss` and `accuracy` on what was trained on, the learning rate `lr`, the
    `forwards` of an example through the network that is trained, and how many times `dearer` an update has become"""

    @property
    def averaged(self) -> bool:
        """Whether the new model is an average of the weights on the way."""
        return any(name.startswith(AVERAGE) for name in self.tensors)

    def put_into(self, model: Classifier) -> None:
        """Give a model of the same architecture the new weights."""
        first = AVERAGE if self.averaged else WEIGHTS
        model.load_state_dict(beginning(self.tensors, first))
