"""The result of a check of `holdfast doctor`, and the sample of model outputs on which checks are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, TargetLost
from holdfast.core.model import Classifier
from holdfast.core.remedies import Install, Remedy, with_remedies

Level = Literal["problem", "warning", "note", "good"]

BETTER = 0.15
"""Smallest increase of accuracy for which an alternative interpretation of the data is reported."""
MORE = 5
"""Smallest number of additional examples that it must classify correctly."""
STEADY = 1e-4
"""Largest change of an output that can be due to rounding, relative to the largest logit."""


@dataclass(frozen=True)
class Finding:
    """The result of one check of `holdfast doctor`: a problem, a warning, or the statement that nothing is wrong."""

    check: str
    level: Level
    message: str
    """description of the finding, with numbers"""
    advice: str = ""
    """what can be done about it, besides the remedies"""
    gain: float | None = None
    """increase of accuracy by an alternative interpretation of the data; None if no alternative was tried"""
    remedies: tuple[Remedy | Install, ...] = ()
    """changes of arguments that resolve it"""

    @property
    def way_out(self) -> str:
        """Advice and remedies, with arguments of Python; empty if there is nothing to do."""
        return with_remedies(self.advice, [remedy.in_python() for remedy in self.remedies])

    def on_command_line(self) -> str:
        """Return the advice and the remedies, with options of the command line."""
        return with_remedies(self.advice, [remedy.on_command_line() for remedy in self.remedies])

    @property
    def sign(self) -> str:
        """Sign of the level: `x` for a problem, `!` for a warning, `i` for how the data are read, `+` for the statement
        that nothing is wrong.
        """
        return {"problem": "x", "warning": "!", "note": "i", "good": "+"}[self.level]

    def __str__(self) -> str:
        """Return the finding as the command line prints it, with arguments of Python."""
        text = f"{self.sign} {self.check:<14}{self.message}"
        return f"{text}\n{' ' * 16}-> {self.way_out}" if self.way_out else text


class Checkup(tuple[Finding, ...]):
    """The findings of `holdfast.doctor`, which are printed line by line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(map(str, self))

    __str__ = __repr__


@dataclass(frozen=True)
class Examined:
    """A model that `holdfast doctor` checks, a sample of its data, and the outputs of the model on the sample in eval
    mode.
    """

    model: Classifier
    batch: Batch
    in_training: tuple[str, ...]
    logits: Tensor
    batch_size: int
    """number of examples in one call of the model"""
    calls: list[int] = field(default_factory=list)
    """number of examples in each further call of the model"""
    left: Callable[[], int] | None = None
    """function that returns how many rows may still be sent to the model; None means no limit"""
    untried: list[int] = field(default_factory=list)
    """numbers of rows that the alternatives needed which were not tried because too few rows were left"""
    moved_by: float | None = None
    """value of `moved` if it was already measured, else None"""
    names: tuple[str, ...] | None = None
    """class names in the order of their numbers, if the labels of the data are names; else None"""

    def ask(self, model: Classifier, x: Tensor) -> Tensor:
        """Return the outputs of `model` on the inputs `x`, and count them as queries of the check.

        `model` is the examined model, or the same network with other preprocessing.
        """
        self.calls.append(len(x))
        return outputs_in_batches(model, x, self.batch_size)

    @property
    def batches(self) -> list[Batch]:
        """The sample in batches of `batch_size` examples."""
        rows = torch.arange(len(self.batch), device=self.batch.ids.device)
        return [self.batch.take(part) for part in torch.split(rows, self.batch_size)]

    def right_with(self, x: Tensor, model: Classifier | None = None) -> float:
        """Return the accuracy on the sample with the inputs `x` instead of the original ones, or with another model.

        The result is 0 if the network rejects the inputs, or if too few rows are left; the latter is recorded in
        `untried`.
        """
        size = 1 if self.model.batches is None else self.model.batches.size
        rows = -(-len(x) // size) * size
        # a fixed batch is filled up, and the server counts these rows as well
        if self.left is not None and rows > self.left():
            self.untried.append(rows)
            return 0.0
        try:
            return share_right(self.ask(model or self.model, x), self.batch.y)
        except TargetLost:  # the server is gone, which says nothing about the interpretation
            raise
        except TargetError:  # the model accepts no such input, so the interpretation is wrong
            return 0.0

    @cached_property
    def moved(self) -> float:
        """Largest change of an output of the model in a second call on the same inputs, relative to the
        largest output.
        """
        if self.moved_by is not None:
            return self.moved_by
        return self.change(self.ask(self.model, self.batch.x))

    def change(self, logits: Tensor) -> float:
        """Return the largest difference between `logits` and the outputs of the first call, relative to the largest of
        these outputs.
        """
        return relative_change(logits, self.logits)

    @property
    def accuracy(self) -> float:
        """Fraction of the sample of examples that the model classifies correctly."""
        return share_right(self.logits, self.batch.y)

    @property
    def may_be_beaten(self) -> bool:
        """Whether the accuracy is low enough that another interpretation of the data, such as another layout, could
        clearly increase it.
        """
        return self.accuracy < 1 - BETTER

    def beaten_by(self, accuracy: float) -> bool:
        """Return whether the given accuracy, measured with another interpretation of the data, is clearly higher than
        that of the model and that of chance.

        At least five more examples must be classified correctly. The result is False for a model whose outputs change
        between calls.
        """
        if not self.may_be_beaten or self.moved > STEADY:
            return False
        gain = accuracy - max(self.accuracy, 1 / self.logits.shape[1])
        return gain > BETTER and gain * len(self.batch) > MORE - 0.5


def relative_change(logits: Tensor, reference: Tensor) -> float:
    """Return the largest difference between two outputs, relative to the largest value of `reference`."""
    scale = reference.nan_to_num().abs().max().clamp_min(1e-12)
    return float((logits - reference).nan_to_num().abs().max() / scale)


def outputs_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the outputs of the model on `x`, computed without gradients."""
    with torch.no_grad():
        return model(x.clone())  # a network may write into its input


def outputs_in_batches(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    """Return the outputs of the model on `x`, computed without gradients for at most `batch_size` examples at once."""
    return torch.cat([outputs_of(model, part) for part in torch.split(x, batch_size)])


def share_right(logits: Tensor, y: Tensor) -> float:
    """Return the fraction of examples whose largest logit is that of their class `y`."""
    return float((logits.argmax(1) == y).double().mean())
