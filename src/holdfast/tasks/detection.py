"""Detection: boxes of objects with scores and labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.names import TaskName
from holdfast.core.tasks import LEFT
from holdfast.core.types import Inputs, PerExample
from holdfast.tasks.box_matching import CONFIDENT, IOUS, MISS, MOST, matched
from holdfast.tasks.box_outputs import fabricate, mislabel, read_boxes, refuse_other_units, vanish

_LOSSES: Mapping[str, Callable[[Tensor, Tensor], PerExample]] = {
    "vanish": vanish,
    "mislabel": mislabel,
    "fabricate": fabricate,
}
_TIE = 0.01  # weight of the confidence in what is left, which decides between equal numbers of objects


@dataclass(frozen=True)
class Detection:
    """Boxes of objects (see `read_boxes`). An object is found if a detection with a score and an IoU of at least 0.5
    has its label; each detection finds one object.
    """

    name: ClassVar[TaskName] = "detection"
    noun: ClassVar[str] = "image"
    ids: tuple[int, ...]
    """label of the model for each class of the data"""
    objective: str = ""
    """what attacks are to achieve (`vanish`, `fabricate` or `mislabel`): that objects are not found, are found where
    none are, or get another label; empty for that fewer objects are found in any of these ways
    """
    no_object: bool | None = None
    """whether the last logit of a model of transformers stands for no object"""

    @property
    def surrogates(self) -> tuple[str, ...]:
        """Names of the losses that attacks can maximise."""
        return (self.objective,) if self.objective else ("vanish", "mislabel")

    @property
    def correct_if(self) -> str:
        """Condition under which an image counts as correct, for reports."""
        if self.objective == "fabricate":
            return "it has at most one false box more than objects"
        return "at least half of its objects are found"

    def read(self, returned: object, x: Inputs) -> Tensor:
        """Return the boxes (n, 100 or more, 6 or more); see `read_boxes`."""
        return read_boxes(returned, x, self.ids, no_object=self.no_object)

    def refuse(self, outputs: Tensor, batch: Batch, name: str) -> None:
        """Raise `TargetError` for boxes in other units than pixels of the images, or without a label of the data."""
        refuse_other_units(outputs, (batch.x.shape[-2], batch.x.shape[-1]), self.ids)

    def _share(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """The share (n) of the objects that are found; k / (k + false boxes) for `fabricate`, with k = objects + 1."""
        rows, truth = outputs[:, :MOST, :6].detach().double(), truth.double()
        confident = (rows[..., 4] >= CONFIDENT) & (rows[..., 5] >= 0)
        most = int(confident.sum(1).amax()) if len(rows) else 0  # the confident ones come first
        outcomes, found = matched(rows[:, :most], truth, IOUS[:1].to(rows.device))
        counts = ((truth[..., 4] >= 0) & (truth[..., 5] == 0)).sum(1)
        if self.objective == "fabricate":
            false = ((outcomes[..., 0] == MISS) & confident[:, :most]).sum(1)
            return (counts + 1) / (counts + 1 + false).to(outputs.dtype)
        return torch.where(counts > 0, found.sum(1) / counts.clamp_min(1), 1.0).to(outputs.dtype)

    def lead(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return the share of the objects that are found minus 1/2, positive from one half on; for `fabricate` the
        share of k = objects + 1 in the sum of k and the number of false boxes, minus 1/2.
        """
        return self._share(outputs, truth) - 0.5 + 1e-6

    def left(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return the share of `lead`. The default loss decides between equal shares, with a weight of 1 %."""
        loss = self.loss(outputs.detach(), truth, self.surrogates[0])
        confidence = (
            1 / (1 + loss.exp()) if self.objective == "fabricate" else -loss / (1 - loss.clamp_max(0))
        )
        share = self._share(outputs, truth)
        return (share + _TIE * confidence.clamp(0, 1)) / (1 + _TIE)

    def loss(self, outputs: Tensor, truth: Tensor, surrogate: str) -> PerExample:
        """Return the loss of one objective: `vanish`, `mislabel` or `fabricate`."""
        return _LOSSES[surrogate](outputs, truth)

    def measured(self, outputs: Tensor, truth: Tensor) -> Mapping[str, Tensor]:
        """Return the boxes of the model, `boxes` (n, 100, 6), and those of the objects, `truth` (n, k, 6)."""
        return {LEFT: self.left(outputs, truth), "boxes": outputs[:, :MOST, :6], "truth": truth}

    def shown(self, outputs: Tensor) -> Tensor:
        """Return the boxes (n, 100, 6)."""
        return outputs[:, :MOST, :6]

    def card(self) -> Mapping[str, Any]:
        """Return the fields as JSON values."""
        return {
            "name": self.name,
            "ids": list(self.ids),
            "objective": self.objective,
            "no_object": self.no_object,
        }
