"""Flow: an attack on images that displaces each pixel by a small distance.

Xiao et al., "Spatially Transformed Adversarial Examples", ICLR 2018, arXiv:1801.02612 (stAdv). Differs from the paper:
displacements are limited by the threat model, not only by the weight of the flow's total variation; the first
start has the largest displacements, in the directions of the image's one-sided slopes at each pixel; in place of
L-BFGS, all pixels take steps of one length, with momentum and step sizes along a cosine; and an example is dropped at
its first success.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.images import flowed
from holdfast.attacks.parts.losses import Best, margin
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient, levelled
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, NonNegative, PerExample, Positive, Restarts, Steps
from holdfast.threats.transformations import expect_flow

_TINY = 1e-8  # added under the root, because a constant flow would have a gradient of NaN
_NEAR = 1e-3  # displacement in pixels at which the one-sided slope of the image is measured
_MOMENTUM = 0.75  # as in APGD (arXiv:2003.01690)


@dataclass(frozen=True)
class Flow:
    """Displaces the pixels of an image by a smooth flow field, each within the limit of the threat model."""

    steps: Steps = 50
    """number of gradient steps of one restart"""
    restarts: Restarts = 5
    """number of starts, all but the first at random; each is run on the examples that survive the previous starts"""
    step_size: Positive = 0.8
    """mean step size of each pixel, as a fraction of the largest displacement"""
    smoothness: NonNegative = 0.001
    """weight of the total variation of the flow (in pixels) relative to the margin; 0.05 in the paper"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        limit, best = expect_flow(threat.constraint, self), Best(batch)
        for restart in range(self.restarts):
            remaining = batch.take(best.surviving)
            if not len(remaining):
                break
            u = rng.at("restart", restart).uniform(
                remaining.ids, 2, *remaining.x.shape[2:], dtype=remaining.x.dtype
            )
            start = _shortened(2 * u - 1) if restart else _downhill(model, remaining, u)
            self._descend(model, remaining, start, limit, best)
        return best.x

    def _descend(self, model: Model, remaining: Batch, field: Tensor, limit: float, best: Best) -> None:
        """One path in shares of the limit; all points are offered to `best`, and broken examples are dropped."""
        direction = torch.zeros_like(field)
        for step in range(self.steps + 1):
            field = field.detach().requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                x = flowed(remaining.x, limit * field, model.bounds)
                margins = margin(model(x, remaining.ids), remaining)
                objective = margins + self.smoothness * _variation(limit * field)
            best.offer(remaining, x.detach(), margins.detach())
            surviving = margins.detach() > 0
            if step == self.steps or not surviving.any():
                return
            direction = _MOMENTUM * direction + levelled(input_gradient(objective, field))
            unit = direction / _length(direction).clamp_min(_TINY)
            size = self.step_size * cosine(step, self.steps)
            field = _shortened(field.detach() - size * unit)[surviving]
            remaining, direction = remaining.take(surviving), direction[surviving]


def _downhill(model: Model, batch: Batch, like: Tensor) -> Tensor:
    """Displacements of length one that lower the margin, from the image's one-sided slopes at each pixel."""
    grad_forward, grad_backward = (
        input_gradient(margin(model(flowed(batch.x, field, model.bounds), batch.ids), batch), field)
        for field in (torch.full_like(like, side).requires_grad_() for side in (_NEAR, -_NEAR))
    )
    gain_forward, gain_backward = (-grad_forward).clamp_min(0), grad_backward.clamp_min(0)
    direction = levelled(torch.where(gain_forward > gain_backward, gain_forward, -gain_backward))
    return direction / _length(direction).clamp_min(_TINY)


def _length(field: Tensor) -> Tensor:
    """Length of the vector at each pixel, (n, 1, height, width)."""
    return field.square().sum(1, keepdim=True).sqrt()


def _shortened(field: Tensor) -> Tensor:
    """The displacement of each pixel, clipped to length one."""
    return field / _length(field).clamp_min(1)


def _variation(flow: Tensor) -> PerExample:
    """Total variation: the sum of the lengths of differences between neighbours along rows and columns."""
    total = flow.new_zeros(len(flow))
    for side in (2, 3):
        total = total + (flow.diff(dim=side).square().sum(1) + _TINY).sqrt().flatten(1).sum(1)
    return total
