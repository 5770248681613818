"""A number with its confidence interval. Imports no torch, so that reports and the command line can use it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Value of a metric on `n` examples, with its confidence interval [`low`, `high`]."""

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value
