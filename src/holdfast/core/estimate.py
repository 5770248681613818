"""The type of a number with its confidence interval, and the goal of a training: the metric by which the new model is
compared with the given one. The module does not import torch.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Estimate:
    """Value of a metric on `n` examples, with its confidence interval [`low`, `high`]."""

    value: float
    low: float
    high: float
    n: int

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Goal:
    """A metric, and the direction in which it is better."""

    metric: str = "robust_accuracy"
    better: Literal["higher", "lower"] = "higher"
