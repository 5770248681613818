"""Base classes of constraints that are not balls of a norm."""

from abc import abstractmethod

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs
from holdfast.threats.parsing import limits_text


class Limited(Constraint):
    """Base class of constraints that have limits by name, such as the size of a patch."""

    def __str__(self) -> str:
        return limits_text(self.name, self.limits)


class Whole(Limited):
    """Base class of constraints that change an input as a whole, such as rotations, under which attacks on single input
    values raise `UsageError`.
    """

    @property
    def eps(self) -> float:
        """Always 1, which allows all that the limits allow."""
        return 1.0

    @abstractmethod
    def refusal(self) -> UsageError:
        """Return the error for an attack on single input values, which cannot be used under such a constraint."""

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise an error, because an attack that projects cannot be used: no nearest allowed input can be computed."""
        raise self.refusal()

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise an error, because an attack that steps along gradients cannot be used under this constraint."""
        raise self.refusal()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Raise an error, because the constraint has no ball from which a random input could be sampled."""
        raise self.refusal()
