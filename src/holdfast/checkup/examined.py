"""The result of a check, and the model and data that the checks use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, TargetLost
from holdfast.core.model import Classifier

Level = Literal["problem", "warning", "good"]

BETTER = 0.15
"""Increase of accuracy that another reading of the data must reach."""
_MORE = 5  # number of additional examples that it must classify correctly
STEADY = 1e-4
"""Change of an output by rounding, relative to the largest logit."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    level: Level
    says: str
    """description with numbers"""
    way_out: str = ""
    gain: float | None = None
    """increase of accuracy by another reading of the data; None if no reading was tried"""


@dataclass(frozen=True)
class Examined:
    """A model, some of its data, and its outputs on them in eval mode."""

    model: Classifier
    batch: Batch
    in_training: tuple[str, ...]
    logits: Tensor
    batch_size: int
    """number of examples in one call of the model"""
    calls: list[int] = field(default_factory=list)
    """number of examples in each further call"""
    left: Callable[[], int] | None = None
    """returns the number of rows that may still be sent to the model; None means no limit"""
    untried: list[int] = field(default_factory=list)
    """number of rows of each reading that was not tried because too few rows were left"""
    moved_by: float | None = None
    """value of `moved` if it was measured already"""

    def ask(self, model: Classifier, x: Tensor) -> Tensor:
        """Outputs of the model, or of the same network with other preprocessing."""
        self.calls.append(len(x))
        return torch.cat([outputs_of(model, part) for part in torch.split(x, self.batch_size)])

    def right_with(self, x: Tensor, model: Classifier | None = None) -> float:
        """Accuracy on the sample with other inputs or another model; 0 if the network refuses them.

        It is also 0 if too few rows are left, which `untried` records.
        """
        size = 1 if self.model.batches is None else self.model.batches.size
        rows = -(-len(x) // size) * size
        if self.left is not None and rows > self.left():
            self.untried.append(rows)
            return 0.0
        try:
            return share_right(self.ask(model or self.model, x), self.batch.y)
        except TargetLost:
            raise
        except TargetError:
            return 0.0

    @cached_property
    def moved(self) -> float:
        """Change of the outputs in a second call, relative to the largest logit."""
        if self.moved_by is not None:
            return self.moved_by
        return self.change(self.ask(self.model, self.batch.x))

    def change(self, logits: Tensor) -> float:
        """Largest difference from the outputs, relative to the largest output."""
        scale = self.logits.nan_to_num().abs().max().clamp_min(1e-12)
        return float((logits - self.logits).nan_to_num().abs().max() / scale)

    @property
    def accuracy(self) -> float:
        """Share of the sample that is classified correctly."""
        return share_right(self.logits, self.batch.y)

    @property
    def may_be_beaten(self) -> bool:
        """Whether an alternative can increase the accuracy by `BETTER`; if not, none needs to be tried."""
        return self.accuracy < 1 - BETTER

    def beaten_by(self, other: float) -> bool:
        """Whether the accuracy `other` exceeds that of the model and of chance by more than `BETTER`, on enough
        examples.

        It is False for a model whose outputs change between calls.
        """
        if not self.may_be_beaten or self.moved > STEADY:
            return False
        more = other - max(self.accuracy, 1 / self.logits.shape[1])
        return more > BETTER and more * len(self.batch) > _MORE - 0.5


def outputs_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outputs of the model without gradients."""
    with torch.no_grad():
        return model(x.clone())  # a network may write into its input


def share_right(logits: Tensor, y: Tensor) -> float:
    """Share of the examples whose largest output belongs to their class."""
    return float((logits.argmax(1) == y).double().mean())
