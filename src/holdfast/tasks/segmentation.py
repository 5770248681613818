"""Segmentation: a class of each pixel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.errors import NoLogits, TargetError, UnclearOutput
from holdfast.core.names import TaskName
from holdfast.core.outputs import LOGIT, PROBABILITY, OutputKind, values_known
from holdfast.core.tasks import LEFT
from holdfast.core.types import Inputs, PerExample
from holdfast.tasks.reading import tensor_of

IGNORED: Final = -1
"""class of the pixels that do not count"""
_CORRECT = 0.5
_ROUNDING = 1e-6
"""more than the rounding error of a mean IoU in single precision"""


def image_ious(pixels: Tensor) -> PerExample:
    """Return the mean IoU of each image over the classes in its mask, from the numbers of right, predicted and true
    pixels (n, classes, 3); 1 for a mask without a pixel that counts.
    """
    right, predicted, true = pixels.unbind(2)
    present = true > 0
    each = torch.where(present, right / (predicted + true - right).clamp_min(1), 0.0)
    mean: PerExample = each.sum(1) / present.sum(1).clamp_min(1)
    return torch.where(present.any(1), mean, 1.0)


@dataclass(frozen=True)
class Segmentation:
    """Scores of the classes of each pixel, (n, classes, height, width), or one logit or probability of class 1 of each
    pixel, (n, 1, height, width). Scores of another size than the images are resized bilinearly.
    """

    name: ClassVar[TaskName] = "segmentation"
    noun: ClassVar[str] = "image"
    output: OutputKind | None = None
    """what one number for each pixel is; None if values outside of [0, 1] show that it is a logit"""
    aim: int | None = None
    """class that all pixels are to get by the attacks; None for any wrong classes"""

    @property
    def surrogates(self) -> tuple[str, ...]:
        """Names of the losses that attacks can maximise."""
        return ("right-pixels", "divergence") if self.aim is None else ("towards",)

    @property
    def correct_if(self) -> str:
        """Condition under which an example counts as correct, for reports."""
        if self.aim is not None:
            return f"less than half of the pixels of other classes get class {self.aim}"
        return "the mean IoU of its classes is above 0.5"

    def read(self, returned: object, x: Inputs) -> Tensor:
        """Return the scores (n, classes, height, width) at the size of the images. Raises `TargetError` for other
        outputs, `NoLogits` for scores whose last axis is that of the classes.

        Scores that are probabilities become their logarithms, whose gradients do not vanish.
        """
        outputs = tensor_of(returned, self.name, "out")
        if outputs.dim() != 4 or len(outputs) != len(x):
            raise TargetError(
                f"the model returned a tensor of shape {tuple(outputs.shape)} for {len(x)} inputs, and a model for "
                f"segmentation returns ({len(x)}, classes, height, width); declare another task (--task)"
            )
        size = x.shape[-2:]
        if outputs.shape[1:3] == size and outputs.shape[2:] != size:
            raise NoLogits(
                f"the model returned a tensor of shape {tuple(outputs.shape)} for images of {size[0]} x {size[1]} "
                "pixels, with the classes last; return them after the first axis, as in scores.movedim(-1, 1)"
            )
        outputs = self._of_two(outputs) if outputs.shape[1] == 1 else outputs
        if values_known() and _are_probabilities(outputs.detach()):
            outputs = outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
        if outputs.shape[-2:] != size:
            outputs = F.interpolate(outputs, size=tuple(size), mode="bilinear", align_corners=False)
        return outputs

    def _of_two(self, outputs: Tensor) -> Tensor:
        if self.output == "probability":
            outputs = torch.logit(outputs, eps=1e-7)
        return torch.cat((torch.zeros_like(outputs), outputs), 1)

    def refuse(self, outputs: Tensor, batch: Batch, name: str) -> None:
        """Raise `TargetError` for masks of another size than the images, or with classes that the model does not
        have.
        """
        assert batch.truth is not None
        truth = batch.truth
        if outputs.shape[-2:] != truth.shape[-2:]:
            raise TargetError(
                f"the masks of {name} are {tuple(truth.shape[-2:])}, and its images {tuple(outputs.shape[-2:])}; give "
                "masks of the size of the images"
            )
        highest, classes = int(truth.max()), outputs.shape[1]
        if highest >= classes:
            raise TargetError(
                f"the masks of {name} have the class {highest}, and the model has {classes} classes (0 to "
                f"{classes - 1}); pixels that do not count are 255 or -1"
            )
        if self.aim is not None and self.aim >= classes:
            raise TargetError(
                f"the goal is class {self.aim}, and the model has {classes} classes (0 to {classes - 1}); give one of "
                "them, as in goal=map:0"
            )
        single = outputs[:, 1] - outputs[:, 0]  # of one number for each pixel, that number
        if self.output is None and outputs.shape[1] == 2 and bool(((single >= 0) & (single <= 1)).all()):
            raise UnclearOutput(
                "the model returns one number from 0 to 1 for each pixel, which may be a logit or a probability",
                PROBABILITY,
                LOGIT,
            )

    def _pixels(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Number of pixels of each image and class, (n, classes, 3): right, predicted, true."""
        n, classes = outputs.shape[:2]
        predicted, counted = outputs.argmax(1).flatten(1), (truth != IGNORED).flatten(1)
        # NaN has no class: the pixel counts as wrong
        known = outputs.isfinite().all(1).flatten(1) & counted
        true = truth.flatten(1)
        return torch.stack(
            [
                torch.zeros(n, classes, dtype=torch.long, device=outputs.device).scatter_add_(
                    1, values.clamp_min(0), mask.long()
                )
                for values, mask in (
                    (true, (predicted == true) & known),
                    (predicted, known),
                    (true, counted),
                )
            ],
            2,
        )

    def lead(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return what `left` returns minus 1/2."""
        return self.left(outputs, truth) - _CORRECT

    def left(self, outputs: Tensor, truth: Tensor) -> PerExample:
        """Return the mean IoU of each image over the classes in its mask; 1 for a mask without a pixel that counts.
        With an aim, return the share of the pixels of other classes that do not get this class.
        """
        if self.aim is not None:
            others = (truth != IGNORED) & (truth != self.aim)
            reached = (others & (outputs.argmax(1) == self.aim)).flatten(1).sum(1)
            return 1 - (reached / others.flatten(1).sum(1).clamp_min(1)).to(outputs.dtype)
        return image_ious(self._pixels(outputs, truth).to(outputs.dtype))

    def lowest_lead(self, proved: Tensor, true: Tensor) -> Tensor:
        """Return the lowest possible lead (n,), float64, of images of which some pixels are proved to be right, from
        the numbers of these, `proved`, and of all pixels that count, `true`, both (n, classes).

        A pixel that is not proved may get any wrong class. The lowest mean is reached by pixels that each reduce it the
        most, because further pixels of the same wrong class reduce its IoU less and less.
        """
        proved, true = proved.double()[:, :, None], true.double()[:, :, None]
        lost = true - proved
        total = lost.sum(1, keepdim=True)
        wrong = torch.arange(int(total.max()) + 1, dtype=torch.float64, device=true.device)
        unions = (true + wrong).clamp_min(1)
        gains = torch.where(wrong < total - lost, proved / unions - proved / (unions + 1), 0.0)
        sums = F.pad(gains.flatten(1).sort(descending=True).values.cumsum(1), (1, 0))
        kept = (proved / true.clamp_min(1)).sum((1, 2)) - sums.gather(1, total[:, :, 0].long())[:, 0]
        present = (true > 0).sum((1, 2))
        mean = torch.where(present > 0, kept / present.clamp_min(1), 1.0)
        return mean - _CORRECT - _ROUNDING

    def loss(self, outputs: Tensor, truth: Tensor, surrogate: str) -> PerExample:
        """Return a mean over the pixels that count, each weighted by the inverse number of pixels of its class in the
        image: the cross-entropy of the pixels that are still right, or the Jensen-Shannon divergence of all. Towards an
        aim, it is the mean log-probability of this class over the pixels that do not have it.

        Sources: Croce, Singh & Hein, "Towards Reliable Evaluation and Fast Training of Robust Semantic Segmentation
        Models" (arXiv:2306.12941), with weights of classes, which that paper uses for the cross-entropy only.
        """
        counted, y = truth != IGNORED, truth.clamp_min(0)
        if self.aim is not None:
            below = (outputs.detach().argmax(1) != self.aim) & counted
            return (outputs.log_softmax(1)[:, self.aim] * below).flatten(1).mean(1)
        sizes = self._pixels(outputs.detach(), truth)[..., 2].to(outputs.dtype)
        present = (sizes > 0).sum(1, keepdim=True).clamp_min(1)
        weights = (1 / (sizes.clamp_min(1) * present)).gather(1, y.flatten(1)).view_as(
            outputs[:, 0]
        ) * counted
        logarithms = outputs.log_softmax(1)
        label = logarithms.gather(1, y[:, None])[:, 0]
        right = (outputs.detach().argmax(1) == y).to(outputs.dtype)
        values = _divergence(label) if surrogate == "divergence" else -label * right
        return (values * weights).flatten(1).sum(1)

    def measured(self, outputs: Tensor, truth: Tensor) -> Mapping[str, Tensor]:
        """Return the numbers of right, predicted and true pixels of each class, `pixels` (n, classes, 3)."""
        return {LEFT: self.left(outputs, truth), "pixels": self._pixels(outputs, truth)}

    def shown(self, outputs: Tensor) -> Tensor:
        """Return the class of each pixel (n, height, width), int16, and -1 for pixels whose scores are not finite."""
        return outputs.argmax(1).where(outputs.isfinite().all(1), IGNORED).short()

    def card(self) -> Mapping[str, Any]:
        """Return the fields as JSON values."""
        return {"name": self.name, "output": self.output, "aim": self.aim}


def _are_probabilities(outputs: Tensor) -> bool:
    return bool((outputs.amin() >= 0) & ((outputs.sum(1) - 1).abs() < 1e-3).all())


def _divergence(label: Tensor) -> Tensor:
    """The Jensen-Shannon divergence between the probabilities of a pixel and its class, from the logarithm of the
    probability p of the class: (log(2 / (1 + p)) + p log(2 p / (1 + p)) + (1 - p) log 2) / 2.
    """
    p = label.exp()
    half = torch.log1p(p) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    return 0.5 * (
        -half + p * (label - half) + (1 - p) * torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    )
