"""Transfer: adversarial examples of surrogate models only, which may also break the target.

One loop for a family of methods, each a setting of it: momentum (MI-FGSM, Dong et al., "Boosting Adversarial Attacks
with Momentum", CVPR 2018, arXiv:1710.06081); gradients at the point ahead of the momentum, and copies of halved
brightness (NI-FGSM, SI-NI-FGSM, Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for Adversarial
Attacks", ICLR 2020, arXiv:1908.06281); resized images (DI2-FGSM, Xie et al., CVPR 2019, arXiv:1803.06978); shifted ones
(TI-FGSM, Dong et al., CVPR 2019, arXiv:1904.02884); and gradients corrected by those of neighbours (VMI-FGSM, Wang &
He, "Enhancing the Transferability of Adversarial Attacks through Variance Tuning", CVPR 2021, arXiv:2103.15571). The
logits of several surrogates are averaged. Differs from the papers: other norms step along their own steepest direction,
the point ahead lies along the step's own direction, and every image is resized and placed separately.
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
    """Computes examples on surrogate models by gradient ascent with momentum, without queries of the target."""

    steps: Steps = 10
    """number of steps; each costs (1 + neighbours) (1 + halvings) gradients of each surrogate, the last one without
    neighbours"""
    reach: Positive = 6.0
    """path length, in multiples of eps"""
    momentum: NonNegative = 1.0
    """factor of the accumulated direction in each step (MI)"""
    ahead: bool = False
    """whether gradients are computed at the point to which the momentum leads (NI)"""
    diversity: Fraction = 0.0
    """probability that an image is shrunk and moved before a gradient is computed (DI)"""
    shifts: Count = 0
    """largest shift in pixels over which gradients are averaged (TI)"""
    halvings: Count = 0
    """number of copies, each with half the brightness of the previous one, whose gradients are averaged (SI)"""
    neighbours: Count = 5
    """number of random points around the current one whose gradients correct its gradient (VMI)"""
    around: Positive = 5.0
    """radius of the neighbours, in multiples of eps"""
    loss: Loss = cross_entropy
    """loss that is maximised"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        if not threat.surrogates:
            raise UsageError(
                "Transfer computes its examples on surrogates, and the threat model has none; add --surrogate MODEL"
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
            if self.neighbours and step + 1 < self.steps:  # for the next step
                correction = self._nearby(source, batch.at(x), threat, place) - grad
            direction = self.momentum * direction + levelled(tuned)
            climb = constraint.steepest(direction, x, model.bounds)
            x = constraint.project(torch.add(x, climb, alpha=size), batch.x, model.bounds)
        return x

    def _gradient(self, source: Model, batch: Batch, rng: Draws) -> Inputs:
        """The mean gradient over the copies of halved brightness, each resized separately."""
        total = torch.zeros_like(batch.x)
        for times in range(1 + self.halvings):
            shown = Viewed(source, self.diversity, times, rng.at("copy", times))
            total += gradient(shown, batch, self.loss)[0]
        return total / (1 + self.halvings)

    def _nearby(self, source: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> Inputs:
        """The mean gradient over random neighbours, which may lie outside the box, as in the paper."""
        origin, room = batch.at(torch.zeros_like(batch.x)), Bounds(-source.bounds.width, source.bounds.width)
        ball = threat.constraint.resized(self.around * threat.constraint.eps)
        total = torch.zeros_like(batch.x)
        for k in range(self.neighbours):
            place = rng.at("neighbour", k)
            total += self._gradient(source, batch.at(batch.x + ball.sample(origin, room, place)), place)
        return total / self.neighbours
