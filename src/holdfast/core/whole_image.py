"""Base class of constraints that change an input as a whole, such as rotations of images and edits of texts, and so are
not balls of a norm.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs


class Whole(ABC):
    """Base class of constraints, such as rotations, under which attacks on single input values raise `UsageError`."""

    is_ball: ClassVar[bool] = False
    in_input_units: ClassVar[bool] = False
    judges_misclassified: ClassVar[bool] = False

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
