"""Several labels: for each of them whether an example has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, UnclearOutput
from holdfast.core.names import TaskName
from holdfast.core.outputs import LOGIT, PROBABILITY, OutputKind
from holdfast.core.tasks import LEFT
from holdfast.core.types import Inputs, PerExample
from holdfast.tasks.reading import tensor_of


@dataclass(frozen=True)
class Multilabel:
    """One number (n, labels) for each label: a logit, or a probability. An example has the labels whose logit is above
    0, or whose probability is above 1/2; a label with exactly 0 or 1/2 counts as wrong.
    """

    name: ClassVar[TaskName] = "multilabel"
    noun: ClassVar[str] = "example"
    output: OutputKind | None = None
    """what the numbers are; None if values outside of [0, 1] show that they are logits"""

    @property
    def surrogates(self) -> tuple[str, ...]:
        """Names of the losses that attacks can maximise."""
        return ("right-labels", "weakest")

    @property
    def correct_if(self) -> str:
        """Condition under which an example counts as correct, for reports."""
        return "all labels are right"

    def read(self, returned: object, x: Inputs) -> Tensor:
        """Return the logits (n, labels). Raises `TargetError` for other outputs."""
        outputs = tensor_of(returned, self.name)
        if outputs.dim() != 2 or len(outputs) != len(x):
            raise TargetError(
                f"the model returned a tensor of shape {tuple(outputs.shape)} for {len(x)} inputs, and a model of "
                f"several labels returns ({len(x)}, labels); declare another task (--task)"
            )
        return torch.logit(outputs, eps=1e-7) if self.output == "probability" else outputs

    def refuse(self, outputs: Tensor, batch: Batch, name: str) -> None:
        """Raise `TargetError` for another number of labels, and `UnclearOutput` if the numbers may be logits or
        probabilities.
        """
        assert batch.truth is not None
        truth = batch.truth
        if outputs.shape != truth.shape:
            raise TargetError(
                f"the model returns {outputs.shape[1]} numbers for each example, and {name} has {truth.shape[1]} "
                "labels; give as many"
            )
        if self.output is None and bool(((outputs >= 0) & (outputs <= 1)).all()):
            raise UnclearOutput(
                "the model returns numbers from 0 to 1 for each label, which may be logits or probabilities",
                PROBABILITY,
                LOGIT,
            )

    def _margins(self, outputs: Tensor, truth: Tensor) -> Tensor:
        return torch.where(truth > 0, outputs, -outputs)

    def lead(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return the smallest margin over the labels, which is positive if all are right."""
        return self._margins(outputs, truth).amin(1)

    def left(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return the share of the labels that are right."""
        return (self._margins(outputs, truth) > 0).to(outputs.dtype).mean(1)

    def loss(self, outputs: Tensor, truth: Tensor, surrogate: str) -> PerExample:
        """Return the mean cross-entropy of the labels that are right (`right-labels`), or minus the smallest margin."""
        margins = self._margins(outputs, truth)
        if surrogate == "weakest":
            return -margins.amin(1)
        right = (margins > 0).to(outputs.dtype)
        return (F.softplus(-margins) * right).sum(1) / outputs.shape[1] + (1 - right).mean(1)

    def measured(self, outputs: Tensor, truth: Tensor) -> Mapping[str, Tensor]:
        """Return which labels were predicted, `output`, and which are true, `truth`, both (n, labels). NaN and a logit
        of 0 count as the wrong prediction, as in `left`.
        """
        true = truth > 0
        predicted = true == (self._margins(outputs, truth) > 0)
        return {LEFT: self.left(outputs, truth), "output": predicted.long(), "truth": true.long()}

    def shown(self, outputs: Tensor) -> Tensor:
        """Return the logits (n, labels)."""
        return outputs

    def card(self) -> Mapping[str, Any]:
        """Return the fields as JSON values."""
        return {"name": self.name, "output": self.output}
