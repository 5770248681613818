"""AdversarialPatch: one patch for all images, learned on examples that are not judged.

Brown et al., "Adversarial Patch", NeurIPS 2017 workshop, arXiv:1712.09665. Differs from the paper: the patch is a
rectangle that lies where the threat says, it climbs by the gradient's sign in steps that fall along a cosine, and it is
turned, scaled and lit by what the model is seen through (`transform`), if anything, instead of by draws of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps
from holdfast.ops.ascent import cosine
from holdfast.ops.gradients import input_gradient
from holdfast.ops.learned import Pasted, some, truncated, unfitted
from holdfast.ops.patches import expect_patch, pasted


@dataclass(frozen=True)
class AdversarialPatch:
    """Learn one filling of the patch that breaks the model on as many images as it can, and paste it into each."""

    examples: Steps = 2000
    """examples of the fit split that it is learned on, at most; half of them choose among the fits"""
    fits: Steps = 3
    """times that it is learned from other draws; the one that breaks most of the choosing examples, each at a random
    place, is taken"""
    places: Steps = 1000
    """of each image at which it is tried, at most: the worst of them counts"""
    steps: Steps = 300
    """gradient steps, each on some of them at random places of those that the threat allows"""
    batch: Steps = 100
    """examples of one step"""
    step_size: Positive = 0.05
    """mean length of a step, as a share of the box's width"""

    needs: ClassVar[Access] = "gradients"

    def fit(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """The filling of the patch, as a batch of one."""
        patch = expect_patch(threat.constraint, self)
        low, high = (
            side.expand(batch.x[:1].shape).mean((2, 3), keepdim=True) for side in model.bounds.like(batch.x)
        )
        filling = ((low + high) / 2).repeat(1, 1, patch.height, patch.width)
        for step in range(self.steps):
            few, filling = some(batch, self.batch, rng, step), filling.detach().requires_grad_()
            corners = patch.drawn(few.ids, few.x.shape[1:], rng.at("place", step))
            with torch.enable_grad():
                logits = model(pasted(few.x, filling, corners), few.ids)
                grad = input_gradient(truncated(logits, few).sum()[None], filling)
            size = self.step_size * cosine(step, self.steps)
            filling = torch.clamp(filling + size * (high - low) * grad.sign(), low, high)
        return filling.detach()

    def refit(self, k: int, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Tensor:
        """What fit `k` learns, by draws of its own."""
        return self.fit(model, batch, threat, rng=rng.at("fit", k))

    def fitted(self, learned: Tensor) -> Pasted:
        """The attack that pastes it into each image at the worst place."""
        return Pasted(learned, self.places)

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        raise unfitted(self)
