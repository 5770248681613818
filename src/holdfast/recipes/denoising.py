"""Denoised smoothing: a denoiser is trained in front of a given classifier, which is not changed.

Salman, Sun, Yang, Kapoor & Kolter, "Denoised Smoothing: A Provable Defense for Pretrained Classifiers", NeurIPS 2020,
arXiv:2003.01908. The new model is the classifier applied to the denoised input, and serves as the base classifier of
randomised smoothing. `mse` weights the squared error of the denoised image, and `stability` the cross-entropy of the
prediction at the denoised image with the classifier's own prediction at the clean one, so that no labels are needed.
Differs from the paper: both terms are trained at once instead of one after the other, the denoiser is smaller, the
noise grows with the warm-up of `training`, the weights are averaged, and the learning rate follows one cycle.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from holdfast.certifiers.smoothing import numbered_noise
from holdfast.core.batch import Batch
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.core.outputs import of_classes
from holdfast.core.types import Inputs, NonNegative, Steps
from holdfast.io.models.composed import DEPTH, WIDTH, DenoisedNetwork
from holdfast.recipes.training.fit import Training, Update
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.recipe import LossRecipe


@dataclass(frozen=True)
class Denoising(LossRecipe):
    """Trains a denoiser in front of the network, which itself is not changed."""

    sigma: NonNegative = 0.25
    """standard deviation of the noise, in units of the inputs; smoothing certifies best with the same value"""
    mse: NonNegative = 10.0
    """weight of the mean squared error of the denoised images"""
    stability: NonNegative = 1.0
    """weight of the cross-entropy with the network's own predictions at the clean images"""
    width: Steps = WIDTH
    """number of channels of the denoiser, if the model has none yet"""
    depth: Annotated[int, Ge(2)] = DEPTH
    """number of layers of the denoiser, if the model has none yet"""
    training: Training = field(default_factory=lambda: Training(weight_decay=0.0))

    uses_unlabelled: ClassVar[bool] = True

    def denoiser(self, model: Classifier, shape: tuple[int, ...]) -> dict[str, int] | None:
        """Return the sizes of an untrained denoiser, if the model has none. Raises `UsageError` for a model that cannot
        have one.
        """
        if isinstance(model.net, DenoisedNetwork):
            return None
        if len(shape) != 3 or model.layout == "hwc" or not isinstance(model.net, nn.Module):
            raise UsageError(
                f"denoised puts a denoiser of convolutions in front of a network for images (channels, height, width), "
                f"and the inputs have shape {shape}"
                + (" with the channels last" if model.layout == "hwc" else ""),
                Remedy("recipe", "gaussian-noise"),
            )
        if model.rejects:
            raise UsageError(
                "denoised puts a denoiser in front of the network, and this model has a detector that rejects inputs; "
                "harden the network without its detector, and combine the new one with it"
            )
        return {"channels": shape[0], "width": self.width, "depth": self.depth}

    def prepared(self, loop: Loop) -> Loop:
        """Return the training. Raises `UsageError` for a model without a denoiser, or settings that do not train it."""
        if not isinstance(loop.model.net, DenoisedNetwork):
            raise UsageError(
                "denoised trains a denoiser, and the model has none; put an untrained one in front of its network, as "
                "harden does: Classifier(DenoisedNetwork(net, channels=3)), from holdfast.io.models.composed"
            )
        if not self.mse and not self.stability:
            raise UsageError("mse and stability are both 0; give at least one of them a positive weight")
        if self.training.compiled:
            raise UsageError(
                "compiled is true, and this recipe reads the denoised images inside the network, which is not possible "
                "in a compiled one; leave recipe.training.compiled out"
            )
        return loop

    def inner(self, learner: Learner, batch: Batch, update: Update) -> Inputs:
        """Return the inputs of a batch with Gaussian noise, which are not clipped to the valid range."""
        noise = numbered_noise(update.rng.at("noise"), batch.ids, torch.zeros_like(batch.ids), batch.x)
        return batch.x + update.grown * self.sigma * noise

    def loss(self, learner: Learner, batch: Batch, x_adv: Inputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch of noisy inputs, and the number that is classified correctly after
        denoising.
        """
        net = learner.net.net
        assert isinstance(net, DenoisedNetwork)
        with net.recorded() as images:
            logits = learner.net(x_adv)
        (denoised,), clean = images, learner.net.preprocess(batch.x)
        loss = self.mse * F.mse_loss(denoised, clean)
        if self.stability:
            with torch.no_grad():
                predicted = of_classes(net.classifier(clean), learner.net.output).argmax(1)
            loss = loss + self.stability * F.cross_entropy(logits, predicted)
        return loss, hits(logits, batch.y)
