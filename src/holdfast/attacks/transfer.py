"""Transfer: computes adversarial examples on surrogate models only, and uses them against the target model.

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
import torch.nn.functional as F

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.fast_networks import Ensemble
from holdfast.attacks.parts.losses import Loss, cross_entropy, expect_eps
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import SURROGATE, UsageError
from holdfast.core.gradients import levelled
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Fraction, Ids, Inputs, Logits, NonNegative, Positive, Steps


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
            raise UsageError("Transfer computes its examples on surrogates, and there is none", SURROGATE)
        constraint = expect_eps(threat.constraint, self)
        source = Ensemble(threat.surrogates, model.bounds)
        size = self.reach * constraint.eps / self.steps
        x, direction, correction = batch.x, torch.zeros_like(batch.x), torch.zeros_like(batch.x)
        for step in range(self.steps):
            point, step_rng = x, rng.at("step", step)
            if self.ahead:
                lead = constraint.steepest(direction, x, model.bounds)
                point = model.bounds.clamp(torch.add(x, lead, alpha=size * self.momentum))
            grad = self._gradient(source, batch.at(point), step_rng)
            tuned = shifted(grad + correction, self.shifts)
            if self.neighbours and step + 1 < self.steps:  # for the next step
                correction = self._nearby(source, batch.at(x), threat, step_rng) - grad
            direction = self.momentum * direction + levelled(tuned)
            climb = constraint.steepest(direction, x, model.bounds)
            x = constraint.project(torch.add(x, climb, alpha=size), batch.x, model.bounds)
        return x  # the last point: the logits of a changed view do not evaluate it

    def _gradient(self, source: Model, batch: Batch, rng: Draws) -> Inputs:
        """The mean gradient over the copies of halved brightness, each resized separately."""
        total = torch.zeros_like(batch.x)
        for times in range(1 + self.halvings):
            viewed = _Viewed(source, self.diversity, times, rng.at("copy", times))
            total += gradient(viewed, batch, self.loss)[0]
        return total / (1 + self.halvings)

    def _nearby(self, source: Model, batch: Batch, threat: ThreatModel, rng: Draws) -> Inputs:
        """The mean gradient over random neighbours, which may lie outside the box, as in the paper."""
        origin, room = batch.at(torch.zeros_like(batch.x)), Bounds(-source.bounds.width, source.bounds.width)
        ball = threat.constraint.resized(self.around * threat.constraint.eps)
        total = torch.zeros_like(batch.x)
        for k in range(self.neighbours):
            draws = rng.at("neighbour", k)
            total += self._gradient(source, batch.at(batch.x + ball.sample(origin, room, draws)), draws)
        return total / self.neighbours


_IMAGE = 4  # dimensions of a batch of images; only images are resized and shifted
SHRUNK = 0.9
"""smallest size of a resized image, as a fraction of its original size"""
_SIGMAS = 3.0
"""Extent of the kernel to each side in standard deviations, as in Dong et al. 2019."""


def resized(x: Inputs, ids: Ids, bounds: Bounds, chance: float, rng: Draws) -> Inputs:
    """Shrink each image with probability `chance` and place it at random on an empty background, for better transfer.

    Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity", CVPR 2019, arXiv:1803.06978.
    Differs from the paper: every image has its own random numbers, and sizes and places are not whole pixels.
    """
    if not chance or x.dim() != _IMAGE or not len(x):
        return x
    chosen, size, across, down = rng.uniform(ids, 4, dtype=x.dtype).unbind(1)
    size = torch.where(chosen < chance, 1 - (1 - SHRUNK) * size, 1.0)
    zero = torch.zeros_like(size)
    offsets = ((2 * position - 1) * (1 - size) / size for position in (across, down))
    scaled = 1 / size
    rows = [torch.stack(row, 1) for row in zip((scaled, zero), (zero, scaled), offsets, strict=True)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    low, _ = bounds.like(x)
    smaller: Inputs = F.grid_sample(x - low, grid, align_corners=False)
    return low + smaller


def shifted(gradient: Inputs, reach: int) -> Inputs:
    """Return the gradient blurred by a Gaussian, which approximates the mean gradient over shifts by up to `reach`
    pixels.

    Dong et al., "Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks", CVPR 2019,
    arXiv:1904.02884: a Gaussian kernel, applied along both axes in turn.
    """
    if not reach or gradient.dim() != _IMAGE:
        return gradient
    steps = torch.linspace(-_SIGMAS, _SIGMAS, 2 * reach + 1, dtype=gradient.dtype, device=gradient.device)
    weight = torch.exp(-(steps**2) / 2)
    weight = (weight / weight.sum()).repeat(gradient.shape[1], 1, 1, 1)
    down = F.conv2d(gradient, weight.mT, padding=(reach, 0), groups=gradient.shape[1])
    return F.conv2d(down, weight, padding=(0, reach), groups=gradient.shape[1])


def halved_view(x: Inputs, times: int, bounds: Bounds) -> Inputs:
    """Return darker inputs: each value's distance from its lowest valid value is divided by 2 to the power `times`.

    Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks", ICLR 2020,
    arXiv:1908.06281.
    """
    if not times:
        return x
    low, _ = bounds.like(x)
    view: Inputs = low + (x - low) / 2**times
    return view


@dataclass(frozen=True)
class _Viewed:
    """A model that receives darkened and resized inputs.

    `model` receives the inputs after `halved_view` with `halvings` halvings and, with probability `chance`, after
    `resized`, which draws from `rng`.
    """

    model: Model
    chance: float
    halvings: int
    rng: Draws

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the transformed inputs; the random numbers depend on `ids`."""
        assert ids is not None
        view = halved_view(x, self.halvings, self.bounds)
        return self.model(resized(view, ids, self.bounds, self.chance, self.rng), ids)
