"""AdversarialPatch: one patch for all images, fitted on examples that are not used for the evaluation.

Brown et al., "Adversarial Patch", NeurIPS 2017 workshop, arXiv:1712.09665. Differs from the paper: the patch is a
rectangle at the positions of the threat model; gradient ascent uses the sign of the gradient with step sizes along a
cosine; and the patch is rotated, scaled and lit by the transformations of the model (`transform`), if any, and not by
random ones of its own. The patch is evaluated as an image of 8 bits stores it. Under a threat with printable colours,
each step evaluates the patch in the nearest printable colours, and applies the gradient to the values before that (a
straight-through estimator); Sharif et al. (CCS 2016) penalise the distance from printable colours instead.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.images import Pasted, draw_minibatch, expect_patch, truncated, unfitted
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps

_LEVELS = 255
"""steps from the lowest to the highest value of an image of 8 bits"""


@dataclass(frozen=True)
class AdversarialPatch:
    """Optimises one patch that breaks the model on as many images as possible, and pastes it into each image."""

    examples: Steps = 2000
    """largest number of examples of the fit split; half of them are used to choose among the fits"""
    fits: Steps = 3
    """number of fits with different random numbers; the one that breaks most examples, each at a random
    position, is used"""
    places: Steps = 1000
    """largest number of positions of the patch that are tried in each image; the one with the lowest margin is used"""
    steps: Steps = 300
    """number of gradient steps of a fit, each on some examples at random allowed positions"""
    batch: Steps = 100
    """number of examples in one gradient step"""
    step_size: Positive = 0.05
    """mean step size, as a fraction of the width of the box"""

    needs: ClassVar[Access] = "gradients"

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Optimise one patch on the examples of a batch and return it, of shape (1, channels, height, width)."""
        constraint = expect_patch(threat.constraint, self)
        low, high = (
            side.expand(batch.x[:1].shape).mean((2, 3), keepdim=True) for side in model.bounds.like(batch.x)
        )
        patch_values = ((low + high) / 2).repeat(1, 1, constraint.height, constraint.width)
        every = torch.ones_like(patch_values[:, :1], dtype=torch.bool)
        for step in range(self.steps):
            minibatch, patch_values = (
                draw_minibatch(batch, self.batch, rng, step),
                patch_values.detach().requires_grad_(),
            )
            corners = constraint.drawn(minibatch.ids, minibatch.x.shape[1:], rng.at("place", step))
            with torch.enable_grad():
                printed = (
                    patch_values + (constraint.printed(patch_values.detach(), every) - patch_values).detach()
                )
                logits = model(constraint.pasted(minibatch.x, printed, corners), minibatch.ids)
                grad = input_gradient(truncated(logits, minibatch).sum()[None], patch_values)
            size = self.step_size * cosine(step, self.steps)
            patch_values = torch.clamp(patch_values + size * (high - low) * grad.sign(), low, high)
        levels = ((patch_values - low) / (high - low) * _LEVELS).round() / _LEVELS
        return constraint.printed((low + levels * (high - low)).detach(), every)

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """Return the patch of fit number `k`; each fit has its own random numbers, so that the best of several patches
        can be used.
        """
        return self.fit(model, batch, threat, rng=rng.at("fit", k))

    def fitted(self, learned: Tensor) -> Pasted:
        """Return the attack that pastes the fitted patch `learned` into each image, at the position with the lowest
        margin.
        """
        return Pasted(learned, self.places)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        raise unfitted(self)
