"""The type of a number with its confidence interval. The module does not import torch, so that the command line starts
fast.
"""

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
