"""Training on images of which masks hide parts, which prepares a network for certificates against patches.

Xiang, Mahloujifar & Mittal, "PatchCleanser", USENIX Security 2022, arXiv:2108.09135, section 5.1, train with random
masks. Saha et al., "Revisiting Image Classifier Training for Improved Certified Robust Defense against
Adversarial Patches", TMLR 2023, arXiv:2306.12610, train with the masks of the largest loss, since a single pair of
masks with another class prevents a certificate. Differs from the papers: the largest loss is that of a few random pairs
and not of all masks; a weight of the clean cross-entropy may be added, the weights are averaged, and the learning rate
follows one cycle. With `cutout`, some images have a rectangle of the size of a mask at any place instead: DeVries &
Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, arXiv:1708.04552.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.patch_masks import MASKS, hidden, mask_set
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, Mask, NonNegative, Steps
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, adversarial_cross_entropy
from holdfast.recipes.training.recipe import LossRecipe
from holdfast.threats.transformations import Patch


@dataclass(frozen=True)
class MaskedPatches(LossRecipe):
    """Trains on images with two random masks, as the certificate `patch-masks` with the same `masks` needs."""

    masks: Steps = MASKS
    """number of masks along each axis of an image; patch-masks certifies best with the same value"""
    tries: Steps = 4
    """number of random pairs of masks for each image, of which the pair with the largest loss is learned"""
    cutout: Fraction = 0.0
    """share of pairs that are replaced by one rectangle of the size of the largest mask, at a random place"""
    clean: NonNegative = 0.5
    """weight of the cross-entropy of the images without masks"""
    label_smoothing: Fraction = 0.0
    """fraction of each label that is spread evenly over all classes"""
    training: Training = field(default_factory=Training)

    weights_classes: ClassVar[bool] = True

    def check(self, threat: ThreatModel) -> None:
        """Raise `UsageError` if the threat model is no patch."""
        if not isinstance(threat.constraint, Patch):
            raise UsageError(
                f"the recipe masked-patches is for patches in images, and the threat is {threat.constraint}",
                Remedy("threat", "patch:4x4"),
            )

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return a copy of each image of a batch with masks. Cost: one forward of the frozen network for each pair, if
        there are several.
        """
        patch, rng, bounds = learner.threat.constraint, update.rng.at("masks"), learner.net.bounds
        assert isinstance(patch, Patch)
        copies = [
            hidden(batch.x, self._drawn(patch, batch, rng.at(number)), bounds) for number in range(self.tries)
        ]
        if self.tries == 1:
            return copies[0]
        with torch.no_grad():
            losses = [F.cross_entropy(learner.frozen(x), batch.y, reduction="none") for x in copies]
        largest = torch.stack(losses).argmax(0)
        return torch.stack(copies)[largest, torch.arange(len(batch), device=largest.device)]

    def _drawn(self, patch: Patch, batch: Batch, rng: Draws) -> Mask:
        """Random masks of the pixels to hide, (n, 1, height, width)."""
        masks, shape = mask_set(patch, batch.x.shape[1:], self.masks), batch.x.shape[1:]
        pairs = masks.drawn(batch.ids, rng)
        if not self.cutout:
            return pairs
        height, width = masks.size
        square = Patch(height, width)
        cut = square.mask(batch.x, square.drawn(batch.ids, shape, rng.at("cutout")))
        chosen = rng.at("share").uniform(batch.ids, 1) < self.cutout
        return torch.where(chosen[:, :, None, None], cut, pairs)

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and the number of correct masked images. The loss is the cross-entropy of the
        masked images plus the weighted one of the images without masks.
        """
        return adversarial_cross_entropy(
            learner, batch, x_adv, clean=self.clean, smoothing=self.label_smoothing
        )
