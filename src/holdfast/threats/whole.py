"""Base class of constraints that change an input as a whole, such as rotations of images and edits of texts."""

from abc import abstractmethod

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs


class Whole(Constraint):
    """Base class of constraints that change an input as a whole, such as rotations, under which attacks on single input
    values raise `UsageError`.
    """

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
