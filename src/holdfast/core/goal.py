"""The goal of a training: the metric by which the new model is compared with the given one."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """A metric, and the direction in which it is better."""

    metric: str = "robust_accuracy"
    better: Literal["higher", "lower"] = "higher"
