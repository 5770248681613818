"""A number with what is known of its uncertainty. Torch-free, so that reports and the command line may import it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A metric's value on `n` examples and its interval, [`low`, `high`] at the confidence it was asked with."""

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value
