"""One thing that was found, and the model with its data that the checks look at."""

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
"""Accuracy that another reading of the data must add."""
_MORE = 5  # examples on which it must be right in addition
STEADY = 1e-4
"""Share of the largest logit by which rounding may move an output."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    says: str
    """what was found, with the numbers"""
    way_out: str = ""
    gain: float | None = None
    """accuracy that another reading of the data adds; None where no reading was tried"""


@dataclass(frozen=True)
class Examined:
    """A model as it was given, some of its data, and what it answers to them in eval mode."""

    model: Classifier
    batch: Batch
    in_training: tuple[str, ...]
    logits: Tensor
    batch_size: int
    """examples that go through the model at once"""
    calls: list[int] = field(default_factory=list)
    """how many examples each further call had"""
    left: Callable[[], int] | None = None
    """how many rows the model may still be sent; None is any number"""
    untried: list[int] = field(default_factory=list)
    """how many rows each reading would have taken that was not tried, because they were not left"""
    moved_by: float | None = None
    """`moved`, where it was measured already"""

    def ask(self, model: Classifier, x: Tensor) -> Tensor:
        """Outputs of the model, or of the same network with other preprocessing."""
        self.calls.append(len(x))
        return torch.cat([outputs_of(model, part) for part in torch.split(x, self.batch_size)])

    def right_with(self, x: Tensor, model: Classifier | None = None) -> float:
        """Share of the sample that is right with other inputs or another model; 0 where the network refuses them.

        Also 0 where too few rows are left to try it, which `untried` counts.
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
        """How far the outputs change when the model is asked again, as a share of the largest logit."""
        if self.moved_by is not None:
            return self.moved_by
        return self.change(self.ask(self.model, self.batch.x))

    def change(self, logits: Tensor) -> float:
        """The largest difference to the outputs, as a share of the largest of them."""
        scale = self.logits.nan_to_num().abs().max().clamp_min(1e-12)
        return float((logits - self.logits).nan_to_num().abs().max() / scale)

    @property
    def accuracy(self) -> float:
        """Share of the sample that is classified correctly."""
        return share_right(self.logits, self.batch.y)

    @property
    def may_be_beaten(self) -> bool:
        """Whether an alternative can be right so much more often; if not, none need be tried."""
        return self.accuracy < 1 - BETTER

    def beaten_by(self, other: float) -> bool:
        """Whether an alternative is right so much more often, than chance too, that the model is not weak or noisy."""
        if not self.may_be_beaten or self.moved > STEADY:
            return False
        more = other - max(self.accuracy, 1 / self.logits.shape[1])
        return more > BETTER and more * len(self.batch) > _MORE - 0.5


def outputs_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Outputs of the model, without gradients."""
    with torch.no_grad():
        return model(x.clone())  # a network may write into what it is given


def share_right(logits: Tensor, y: Tensor) -> float:
    """Share of the examples whose largest output is that of their class."""
    return float((logits.argmax(1) == y).double().mean())
