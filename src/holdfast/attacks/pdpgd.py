"""PDPGD (primal-dual proximal gradient descent): minimises the distance to the clean input together with a penalty that
adapts to each example.

Matyasko & Chau, "PDPGD: Primal-Dual Proximal Gradient Descent Adversarial Attack", 2021, arXiv:2106.01538.
Differs from the paper: steps and the first penalty are in units of the first-order distance to the boundary, step sizes
fall to a tenth instead of a hundredth, the pace of the penalty depends on the number of steps, the proximal step in
Adam's metric is solved exactly, an example is dropped once it is broken inside a finite eps, and it ends with a
bisection to the boundary (L0: undoing changes) or, with `refine` (our own), with steps inside the ball.

The proximal operators are in closed form: Parikh & Boyd, "Proximal algorithms", Foundations and Trends in Optimization
2014; for the power 2/3 Cao, Sun & Xu, "Fast image deconvolution using closed-form thresholding formulas of Lq (q = 1/2,
2/3) regularization", J. Vis. Commun. Image R. 2013.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.ascent import Adam, gradient
from holdfast.attacks.parts.boundaries import to_boundary
from holdfast.attacks.parts.losses import (
    Closest,
    expect_norm,
    farthest,
    firmly_broken,
    gap,
    margin,
    margin_loss,
)
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L0, L1, L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Fraction, Inputs, Logits, PerExample, Positive, Steps

_TINY = 1e-30  # prevents divisions by zero
_LARGEST = -math.log(1e-6)  # the paper's bound on the logarithm of the penalty


@dataclass(frozen=True)
class PDPGD:
    """Finds the smallest change by primal-dual proximal gradient descent, with an adaptive penalty per example."""

    steps: Steps = 100
    """number of gradient steps"""
    step_size: Positive = 1.0
    """first step of a value in first-order Linf distances; under L1 and L0, the geometric mean of that and the box's
    width"""
    fall: Fraction = 0.1
    """factor by which the step size has fallen at the last step"""
    price: Positive = 0.001
    """first penalty on the size of the change, as a fraction of the slope of the margin"""
    dual_reach: Positive = 20.0
    """first step of the logarithm of the penalty, times the number of steps; the step falls linearly to a tenth"""
    memory: Fraction = 0.5
    """weight of earlier values in the running mean of the penalties"""
    refine: Count = 0
    """number of gradient steps inside a finite ball, from the projections of the points that ended outside; other
    points do not change"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, Linf, L2, L1, L0)
        closest, remaining, x, adam = Closest(batch), batch, batch.x, Adam(batch.x)
        unit, slope = _scales(model, batch, norm)
        weight = -math.log(self.price) - slope.log()
        share = weight.sigmoid()
        for step in range(self.steps):
            grad, logits = gradient(model, remaining.at(x), _soft_margin)
            broken = firmly_broken(logits, remaining)
            closest.offer(remaining, x, norm.distance(x, remaining.x), broken)
            active = closest.unsolved(remaining, norm.eps)
            if not active.all():
                remaining, x, grad, broken = remaining.take(active), x[active], grad[active], broken[active]
                unit, weight, share = unit[active], weight[active], share[active]
                adam.take(active)
                if not len(remaining):
                    break
            mean, scale = adam.mean_and_scale(-grad)
            size = self.step_size * self.fall ** (step / self.steps) * unit
            x = model.bounds.clamp(x - spread(size, x) * mean / scale)
            price = spread((1 - share) / share * size, x) / scale
            x = model.bounds.clamp(remaining.x + shrunk(norm, x - remaining.x, price))
            dual = self.dual_reach / self.steps * (1 - 0.9 * step / self.steps)
            weight = (weight + dual * torch.where(broken, -1.0, 1.0)).clamp(-_LARGEST, _LARGEST)
            share = torch.lerp(weight.sigmoid(), share, self.memory)
        return to_boundary(model, batch, closest.x, norm, self.refine)


def _scales(model: Model, batch: Batch, norm: Norm) -> tuple[PerExample, PerExample]:
    """Two numbers for each example at the clean input, each of shape (n, 1, …).

    They are the step size of one value, and the decrease of the margin for one unit of the norm.
    """
    grad, logits = gradient(model, batch, margin_loss)
    limit, width = farthest(norm, batch.x, model.bounds), model.bounds.width
    unit = gap(Linf(), grad, logits, batch, model.bounds).clamp_max(width)
    sparse = isinstance(norm, (L1, L0))  # few values change, but by large amounts
    first = limit if isinstance(norm, L0) else gap(norm, grad, logits, batch, model.bounds).minimum(limit)
    slope = margin(logits, batch).abs() / first.clamp_min(_TINY)
    return (unit * width).sqrt() if sparse else unit, slope.nan_to_num(1.0, 1.0, 1.0).clamp(1e-4, 1e4)


def _soft_margin(logits: Logits, batch: Batch) -> PerExample:
    return -F.softplus(margin(logits, batch))


_NEWTON = 6  # Newton steps; the equation is nearly linear, and four steps reach float32 precision


def shrunk(norm: Norm, delta: Inputs, price: Inputs) -> Inputs:
    """Return the proximal operator of a norm at `delta`: the r that minimises `sum((r - delta)^2 / (2 price)) + |r|`,
    where |r| is the size of r in `norm`.

    Prices are positive, one for each coordinate. Under L0 the size is `sum(|r|^(2/3))`, because the number of nonzero
    coordinates has no useful slope.
    """
    flat, price = delta.flatten(1), price.flatten(1).clamp_min(_TINY)
    return _OPERATORS[norm.name](flat, price).view_as(delta)


def _l1(delta: Tensor, price: Tensor) -> Tensor:
    return delta.sign() * (delta.abs() - price).clamp_min(0)


def _l2(delta: Tensor, price: Tensor) -> Tensor:
    """`delta s / (s + price)` with the length s that solves `sum((delta / (s + price))^2) = 1`; zero if no s does."""
    size = delta.norm(dim=1)
    for _ in range(_NEWTON):
        over = size[:, None] + price
        ratio = (delta / over).square()
        total = ratio.sum(1).clamp_min(_TINY)
        slope = (ratio / over).sum(1).clamp_min(_TINY)
        size = (size + total * (total.sqrt() - 1) / slope).clamp_min(0)
    shorter: Tensor = delta * (size[:, None] / (size[:, None] + price))
    return shorter


def _linf(delta: Tensor, price: Tensor) -> Tensor:
    """Clip all coordinates at the height at which the sum of the clipped amounts over their prices is one."""
    size, order = delta.abs().sort(dim=1, descending=True)
    weight = 1 / price.gather(1, order)
    level = (((weight * size).cumsum(1) - 1) / weight.cumsum(1)).amax(1).clamp_min(0)
    return torch.minimum(torch.maximum(delta, -level[:, None]), level[:, None])


def _two_thirds(delta: Tensor, price: Tensor) -> Tensor:
    size = delta.abs()
    nonzero = size > 2 * (2 / 3 * price) ** 0.75
    square = size.square() / 16
    larger = (square + (square.square() - 8 / 729 * price**3).clamp_min(0).sqrt()).clamp_min(_TINY) ** (1 / 3)
    root = (2 * (larger + 2 / 9 * price / larger)).sqrt()
    magnitude = ((root + (2 * size / root - root.square()).clamp_min(0).sqrt()) / 2) ** 3
    return torch.where(nonzero, magnitude * delta.sign(), 0.0)


_OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    L0.name: _two_thirds,
    L1.name: _l1,
    L2.name: _l2,
    Linf.name: _linf,
}
