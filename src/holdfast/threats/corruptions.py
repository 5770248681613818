"""Common corruptions of images as a constraint, such as `corruptions:3` in a threat model."""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.domains import refuse_no_images
from holdfast.threats.whole import Whole


@dataclass(frozen=True)
class Corruptions(Whole):
    """Constraint of one common corruption of an image, such as fog, at a severity from 1 to 5. The severity is `eps`.

    There is no ball: any image inside the box is allowed, since only corruptions run under this constraint and every
    other attack raises `UsageError`. The corruptions are in `holdfast.corruptions`.
    """

    name: ClassVar[str] = "corruptions"
    judges_misclassified: ClassVar[bool] = True
    drawn_at_random: ClassVar[bool] = True

    severity: int = 3

    def without_surrogates(self) -> str:
        """Return why surrogates are not used: a corruption uses no model."""
        return "under common corruptions"

    def refuse_unfit(self, x: Inputs) -> None:
        """Raise `UsageError` if inputs are not images."""
        refuse_no_images(x)

    @property
    def eps(self) -> float:
        """Severity of the corruption, from 1 to 5."""
        return float(self.severity)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each example the severity of the corruption if the image changed, else 0."""
        return self.eps * (x_adv != x).flatten(1).any(1).to(x)

    def resized(self, eps: float) -> "Corruptions":
        """Return the constraint of corruptions whose severity is the integer from 1 to 5 that is nearest to `eps`."""
        return Corruptions(round(min(max(eps, 1), 5)))

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint. Its message names the suite of
        corruptions.
        """
        return UsageError(
            f"under {self} images are corrupted, not attacked",
            Remedy("suite", "corruptions"),
            Remedy("threat", "linf:8/255"),
        )
