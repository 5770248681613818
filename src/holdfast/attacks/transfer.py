"""Transfer: examples made on surrogates alone, in the hope that they turn the target too.

One loop for a family of methods, each a setting of it: momentum (MI-FGSM, Dong et al., "Boosting Adversarial Attacks
with Momentum", CVPR 2018, arXiv:1710.06081); steps from where the momentum leads, and copies of halved brightness
(NI-FGSM, SI-NI-FGSM, Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks", ICLR
2020, arXiv:1908.06281); resized images (DI2-FGSM, Xie et al., CVPR 2019, arXiv:1803.06978); moved ones (TI-FGSM, Dong
et al., CVPR 2019, arXiv:1904.02884); and gradients corrected by those of neighbours (VMI-FGSM, Wang & He, "Enhancing
the Transferability of Adversarial Attacks through Variance Tuning", CVPR 2021, arXiv:2103.15571). Several surrogates
count by the mean of their logits. Differs from the papers: other norms step along their own steepest direction, the
look ahead goes along the step's own direction, and every image is resized and placed for itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Fraction, Inputs, NonNegative, Positive, Steps
from holdfast.ops.ascent import gradient
from holdfast.ops.ensemble import Ensemble
from holdfast.ops.gradients import levelled
from holdfast.ops.losses import Loss, cross_entropy
from holdfast.ops.norms import expect_eps
from holdfast.ops.views import Viewed, shifted


@dataclass(frozen=True)
class Transfer:
    """Climb the surrogates' loss from the clean input, all steps whatever they say; the target is never asked."""

    steps: Steps = 10
    """steps, each of (1 + neighbours) (1 + halvings) gradients of every surrogate; the last goes without neighbours"""
    reach: Positive = 6.0
    """path length, in multiples of eps"""
    momentum: NonNegative = 1.0
    """share of the direction that the next step keeps (MI)"""
    ahead: bool = False
    """take gradients where the momentum leads next (NI)"""
    diversity: Fraction = 0.0
    """chance of an image to be shown smaller and elsewhere (DI)"""
    shifts: Count = 0
    """pixels by which the image may be thought moved (TI)"""
    halvings: Count = 0
    """copies, each of half the last one's brightness, whose gradients count too (SI)"""
    neighbours: Count = 5
    """points around, whose gradients say how much that of the point varies (VMI)"""
    around: Positive = 5.0
    """how far neighbours lie, in multiples of eps"""
    loss: Loss = cross_entropy
    """what is climbed"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        if not threat.surrogates:
            raise UsageError(
                "Transfer makes its examples on surrogates, and the threat model has none; name one: --surrogate MODEL"
            )
        constraint = expect_eps(threat.constraint, self)
        source = Ensemble(threat.surrogates, model.bounds)
        size = self.reach * constraint.eps / self.steps
        x, direction, correction = batch.x, torch.zeros_like(batch.x), torch.zeros_like(batch.x)
        for step in range(self.steps):
            at, place = x, rng.at("step", step)
            if self.ahead:
                lead = constraint.steepest(direction, x, model.bounds)
                at = model.bounds.clamp(torch.add(x, lead, alpha=size * self.momentum))
            grad = self._gradient(source, batch.at(at), place)
            tuned = shifted(grad + correction, self.shifts)
            if self.neighbours and step + 1 < self.steps:  # for the step that follows
                correction = self._nearby(source, batch.at(x), threat, place) - grad
            direction = self.momentum * direction + levelled(tuned)
            climb = constraint.steepest(direction, x, model.bounds)
            x = constraint.project(torch.add(x, climb, alpha=size), batch.x, model.bounds)
        return x

    def _gradient(self, source: Model, batch: Batch, rng: Draws) -> Inputs:
        """The mean gradient over the copies of halved brightness, each resized for itself."""
        total = torch.zeros_like(batch.x)
        for times in range(1 + self.halvings):
            shown = Viewed(source, self.diversity, times, rng.at("copy", times))
            total += gradient(shown, batch, self.loss)[0]
        return total / (1 + self.halvings)

    def _nearby(self, source: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> Inputs:
        """The mean gradient over random points around, which may lie beyond the box, as in the paper."""
        origin, room = batch.at(torch.zeros_like(batch.x)), Bounds(-source.bounds.width, source.bounds.width)
        ball = threat.constraint.resized(self.around * threat.constraint.eps)
        total = torch.zeros_like(batch.x)
        for k in range(self.neighbours):
            place = rng.at("neighbour", k)
            total += self._gradient(source, batch.at(batch.x + ball.sample(origin, room, place)), place)
        return total / self.neighbours
