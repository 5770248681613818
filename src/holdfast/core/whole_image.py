"""What threats share under which an image is changed as a whole: there is no ball, and no pixel to follow."""

from abc import ABC, abstractmethod

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs


class Whole(ABC):
    """A constraint that attacks which change values one by one are refused by."""

    @abstractmethod
    def refusal(self) -> UsageError:
        """What such an attack is told."""

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Refused: what was not changed as a whole has no nearest one."""
        raise self.refusal()

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Refused: values follow no gradient here."""
        raise self.refusal()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Refused: there is no ball to draw from."""
        raise self.refusal()
