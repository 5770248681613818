"""Common corruptions as what may change: the threat that is written `corruptions:3`."""

from dataclasses import dataclass

from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs, PerExample
from holdfast.core.whole_image import Whole


@dataclass(frozen=True)
class Corruptions(Whole):
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

    def resized(self, eps: float) -> "Corruptions":
        """The severity nearest to `eps`."""
        return Corruptions(round(min(max(eps, 1), 5)))

    def refusal(self) -> UsageError:
        """Names the suite that corrupts."""
        return UsageError(
            f"under corruptions:{self.severity} images are corrupted and not attacked; "
            f"choose --suite corruptions, or a threat such as linf:8/255"
        )
