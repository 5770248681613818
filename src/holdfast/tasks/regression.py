"""Regression: numbers, which are right within a tolerance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import Remedy, TargetError
from holdfast.core.names import TaskName
from holdfast.core.tasks import LEFT
from holdfast.core.types import Inputs, PerExample
from holdfast.tasks.reading import tensor_of

_ROUNDING = 1e-6  # of the tolerance, so that an error of exactly the tolerance is within it
_COMPARED = 8  # fewest examples from which the units of outputs and targets are compared
_OTHER_UNITS = 5.0  # ratio of the spreads of outputs and targets in different units, while both rise together


@dataclass(frozen=True)
class Regression:
    """Numbers (n, k), or (n,) for one of each example, which are right if each differs from its target by at most the
    tolerance.
    """

    name: ClassVar[TaskName] = "regression"
    noun: ClassVar[str] = "example"
    tolerance: float
    """largest right difference, in the units of the targets or as a share of each target"""
    relative: bool = False
    """whether the tolerance is a share of the absolute value of each target"""

    @property
    def surrogates(self) -> tuple[str, ...]:
        """Names of the losses that attacks can maximise."""
        return ("error", "above", "below")

    @property
    def correct_if(self) -> str:
        """Condition under which an example counts as correct, for reports."""
        size = f"{100 * self.tolerance:g} % of the target" if self.relative else f"{self.tolerance:g}"
        return f"the error is at most {size}"

    def read(self, returned: object, x: Inputs) -> Tensor:
        """Return the numbers (n, k) of a tensor (n, k) or (n,). Raises `TargetError` for other outputs."""
        outputs = tensor_of(returned, self.name)
        if outputs.dim() not in (1, 2) or len(outputs) != len(x):
            raise TargetError(
                f"the model returned a tensor of shape {tuple(outputs.shape)} for {len(x)} inputs, and a regression "
                f"returns ({len(x)},) or ({len(x)}, numbers); declare another task (--task)"
            )
        return outputs.reshape(len(x), -1)

    def refuse(self, outputs: Tensor, batch: Batch, name: str) -> None:
        """Raise `TargetError` if the numbers of outputs and targets differ, if a target is 0 under a relative
        tolerance, or if the units of the targets are not those of the outputs.
        """
        assert batch.truth is not None
        truth = batch.truth
        if outputs.shape[1:] != truth.shape[1:]:
            raise TargetError(
                f"the model returns {outputs.shape[1]} numbers for each example, and the targets of {name} have "
                f"{truth.shape[1]}; give as many"
            )
        if self.relative and bool((truth == 0).any()):
            raise TargetError(
                f"a target of {name} is 0, of which a tolerance of {100 * self.tolerance:g} % is 0; give a tolerance "
                "in the units of the targets",
                Remedy("tolerance", "0.1"),
            )
        if len(truth) >= _COMPARED:
            _refuse_other_units(outputs.double(), truth.double(), name)

    def size(self, truth: Tensor) -> Tensor:
        """Return the tolerance of each target (n, k) in the units of the targets."""
        return self.tolerance * (truth.abs() if self.relative else torch.ones_like(truth))

    def _errors(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """The signed errors (n, k) in units of the tolerance."""
        return (outputs - truth) / self.size(truth).to(outputs.dtype)

    def lead(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return 1 minus the largest error of each example in units of the tolerance."""
        lead: PerExample = 1 + _ROUNDING - self._errors(outputs, truth).abs().amax(1)
        return lead

    def left(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return tolerance / (tolerance + error) of each example, which is 1/2 for an error of the tolerance."""
        left: PerExample = 1 / (1 + self._errors(outputs, truth).abs().amax(1))
        return left.nan_to_num(nan=0.0)

    def loss(self, outputs: Tensor, truth: Tensor, surrogate: str) -> PerExample:
        """Return the largest error of each example, or the largest one above or below the target."""
        errors = self._errors(outputs, truth)
        signed = {"error": errors.abs(), "above": errors, "below": -errors}[surrogate]
        largest: PerExample = signed.amax(1)
        return largest

    def measured(self, outputs: Tensor, truth: Tensor) -> Mapping[str, Tensor]:
        """Return the numbers of the model, `output`, and the targets, `truth`, both (n, k)."""
        return {LEFT: self.left(outputs, truth), "output": outputs, "truth": truth}

    def shown(self, outputs: Tensor) -> Tensor:
        """Return the numbers (n, k)."""
        return outputs

    def card(self) -> Mapping[str, Any]:
        """Return the fields as JSON values."""
        return {"name": self.name, "tolerance": self.tolerance, "relative": self.relative}


def _refuse_other_units(outputs: Tensor, truth: Tensor, name: str) -> None:
    """Raise `TargetError` if outputs and targets rise together, but in other units, as for a model of standardised
    targets.
    """
    spread, expected = outputs.std(0), truth.std(0)
    if not bool((spread > 0).all() and (expected > 0).all()):
        return
    centred, deviations = outputs - outputs.mean(0), truth - truth.mean(0)
    correlation = (centred * deviations).mean(0) / (spread * expected)
    ratio = torch.maximum(spread / expected, expected / spread)
    far = (outputs.mean(0) - truth.mean(0)).abs() > _OTHER_UNITS * torch.maximum(spread, expected)
    wrong = (correlation > 0.8) & ((ratio > _OTHER_UNITS) | far)
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0, 0])
        raise TargetError(
            f"the model returns {outputs[:, k].mean():.4g} ± {spread[k]:.4g} where the targets of {name} are "
            f"{truth[:, k].mean():.4g} ± {expected[k]:.4g}, and both rise together: they seem to be in other units. "
            "Return the units of the targets, as in lambda x: net(x) * std + mean"
        )
