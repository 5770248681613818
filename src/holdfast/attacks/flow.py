"""Flow: bend an image, each pixel taken from somewhere near its place.

Xiao et al., "Spatially Transformed Adversarial Examples", ICLR 2018, arXiv:1801.02612 (stAdv). Differs from the paper:
no pixel comes from farther than the threat allows, which the paper leaves to the weight of the flow's total variation;
the first start is as far as allowed, where an image's slopes on either side of each pixel point; instead of L-BFGS,
every pixel takes steps of one length, with momentum, that fall along a cosine; and an example leaves at its first
success.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, NonNegative, PerExample, Positive, Restarts, Steps
from holdfast.ops.ascent import cosine
from holdfast.ops.best import Best
from holdfast.ops.gradients import input_gradient, levelled
from holdfast.ops.losses import margin
from holdfast.ops.transformations import expect_flow, flowed

_TINY = 1e-8  # under the root of a flow that is the same all over, whose gradient would be NaN
_NEAR = 1e-3  # pixels beside its own place, where a pixel's slope is that on one side of it
_MOMENTUM = 0.75  # as APGD's (arXiv:2003.01690)


@dataclass(frozen=True)
class Flow:
    """Move the pixels of an image, as smoothly as breaks the model, none farther than the threat allows."""

    steps: Steps = 50
    """gradient steps of one restart"""
    restarts: Restarts = 5
    """starts, all but the first at random; each works only on the examples still standing"""
    step_size: Positive = 0.8
    """mean length of each pixel's step, as a share of the threat's limit"""
    smoothness: NonNegative = 0.001
    """weight of the flow's total variation, in pixels, beside the margin; the paper's is 0.05"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        far, best = expect_flow(threat.constraint, self), Best(batch)
        for restart in range(self.restarts):
            left = batch.take(best.standing)
            if not len(left):
                break
            u = rng.at("restart", restart).uniform(left.ids, 2, *left.x.shape[2:], dtype=left.x.dtype)
            start = _shortened(2 * u - 1) if restart else _downhill(model, left, u)
            self._bend(model, left, start, far, best)
        return best.x

    def _bend(self, model: Model, left: Batch, place: Tensor, far: float, best: Best) -> None:
        """One path in shares of the limit; every point is offered, and an example leaves once it is broken."""
        direction = torch.zeros_like(place)
        for step in range(self.steps + 1):
            place = place.detach().requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                x = flowed(left.x, far * place, model.bounds)
                height = margin(model(x, left.ids), left)
                objective = height + self.smoothness * _variation(far * place)
            best.offer(left, x.detach(), height.detach())
            standing = height.detach() > 0
            if step == self.steps or not standing.any():
                return
            direction = _MOMENTUM * direction + levelled(input_gradient(objective, place))
            unit = direction / _length(direction).clamp_min(_TINY)
            size = self.step_size * cosine(step, self.steps)
            place = _shortened(place.detach() - size * unit)[standing]
            left, direction = left.take(standing), direction[standing]


def _downhill(model: Model, batch: Batch, like: Tensor) -> Tensor:
    """Each pixel moved by one, down the margin: an image's slope to the left of it is not that to its right."""
    ahead, behind = (
        input_gradient(margin(model(flowed(batch.x, place, model.bounds), batch.ids), batch), place)
        for place in (torch.full_like(like, side).requires_grad_() for side in (_NEAR, -_NEAR))
    )
    forth, back = (-ahead).clamp_min(0), behind.clamp_min(0)
    way = levelled(torch.where(forth > back, forth, -back))
    return way / _length(way).clamp_min(_TINY)


def _length(field: Tensor) -> Tensor:
    """Of the vector at each pixel, (n, 1, height, width)."""
    return field.square().sum(1, keepdim=True).sqrt()


def _shortened(place: Tensor) -> Tensor:
    """Each pixel's displacement, cut to a length of one."""
    return place / _length(place).clamp_min(1)


def _variation(flow: Tensor) -> PerExample:
    """How differently neighbours move: the lengths of the differences along rows and columns, summed."""
    total = flow.new_zeros(len(flow))
    for side in (2, 3):
        total = total + (flow.diff(dim=side).square().sum(1) + _TINY).sqrt().flatten(1).sum(1)
    return total
