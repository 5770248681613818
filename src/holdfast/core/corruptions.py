"""Common corruptions as what may change: the threat that is written `corruptions:3`."""

from dataclasses import dataclass

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, PerExample


@dataclass(frozen=True)
class Corruptions:
    """One of the common corruptions, once, at a severity of 1 to 5; `eps` is that severity.

    There is no ball: any image inside the box counts as allowed, since only corruptions are run under it, and every
    other attack is refused. `holdfast.ops.corruptions` makes them.
    """

    severity: int = 3

    @property
    def eps(self) -> float:
        """The severity."""
        return float(self.severity)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """The severity where anything changed, else 0."""
        return self.eps * (x_adv != x).flatten(1).any(1).to(x)

    def project(self, x_adv: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Refused: what is no corruption has no nearest one."""
        raise self._refusal()

    def steepest(self, gradient: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
        """Refused: corruptions follow no gradient."""
        raise self._refusal()

    def sample(self, batch: Batch, bounds: Bounds, rng: Draws) -> Inputs:
        """Refused: there is no ball to draw from."""
        raise self._refusal()

    def resized(self, eps: float) -> "Corruptions":
        """The severity nearest to `eps`."""
        return Corruptions(round(min(max(eps, 1), 5)))

    def _refusal(self) -> UsageError:
        return UsageError(
            f"under corruptions:{self.severity} images are corrupted and not attacked; "
            f"choose --suite corruptions, or a threat such as linf:8/255"
        )
