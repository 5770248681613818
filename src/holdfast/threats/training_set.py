"""Changes of a training set as a constraint, such as `training-set:20` in threat models."""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.whole import Whole


@dataclass(frozen=True)
class TrainingSet(Whole):
    """Constraint of additions and removals of training examples. Their largest number is `eps`.

    A replaced example counts twice: one is removed and one is added. The inputs of the model do not change, so no
    attack applies.
    """

    name: ClassVar[str] = "training-set"
    provers: ClassVar[tuple[str, ...]] = ("partitions",)
    changes_inputs: ClassVar[bool] = False
    measures_robustness: ClassVar[bool] = False

    changes: int

    @property
    def eps(self) -> float:
        """Largest number of training examples that are added or removed."""
        return float(self.changes)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return 0 for each input that did not change, and infinity for any other."""
        changed = (x_adv != x).flatten(1).any(1)
        return x.new_zeros(len(x)).masked_fill(changed, float("inf"))

    def resized(self, eps: float) -> "TrainingSet":
        """Return the constraint of the number of changes that is nearest to `eps`."""
        return TrainingSet(round(eps))

    def refusal(self) -> UsageError:
        """Return the error for an attack, which changes inputs."""
        return UsageError(
            f"the threat {self} changes the training set and no input, so that no attack applies",
            Remedy("threat", "linf:8/255"),
        )
