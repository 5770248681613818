"""Base class of constraints that change an image as a whole, without a ball."""

from abc import ABC, abstractmethod
from typing import ClassVar

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs


class Whole(ABC):
    """A constraint under which attacks that change single values raise `UsageError`."""

    is_ball: ClassVar[bool] = False
    in_input_units: ClassVar[bool] = False
    judges_misclassified: ClassVar[bool] = False

    @abstractmethod
    def refusal(self) -> UsageError:
        """The error that such attacks raise."""

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise the error: there is no nearest allowed image."""
        raise self.refusal()

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise the error: there is no direction of values."""
        raise self.refusal()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Raise the error: there is no ball to sample from."""
        raise self.refusal()
