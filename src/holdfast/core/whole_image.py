"""Base class of constraints that change an image as a whole and have no ball."""

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
        """Return the error that attacks on single values raise under this constraint."""

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise the error of `refusal`, because there is no nearest allowed image."""
        raise self.refusal()

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Raise the error of `refusal`, because there is no steepest direction of single values."""
        raise self.refusal()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Raise the error of `refusal`, because there is no ball to sample from."""
        raise self.refusal()
