"""Proximal operators, which minimise the sum of a weighted squared distance to a given point and a norm.

Parikh & Boyd, "Proximal algorithms", Foundations and Trends in Optimization 2014; for the power 2/3 Cao, Sun & Xu,
"Fast image deconvolution using closed-form thresholding formulas of Lq (q = 1/2, 2/3) regularization", J. Vis. Commun.
Image R. 2013.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from holdfast.core.constraints import L0, L1, L2, Linf, Norm
from holdfast.core.types import Inputs

_NEWTON = 6  # Newton steps; the equation is nearly linear, and four steps reach float32 precision
_TINY = 1e-30


def shrunk(norm: Norm, delta: Inputs, price: Inputs) -> Inputs:
    """Return the r that minimises `sum((r - delta)^2 / (2 price)) + |r|`, where |r| is the size in `norm`.

    Prices are positive, one for each coordinate. Under L0 the size is `sum(|r|^(2/3))`, because the number of nonzero
    coordinates has no useful slope.
    """
    flat, price = delta.flatten(1), price.flatten(1).clamp_min(_TINY)
    return _OPERATORS[type(norm)](flat, price).view_as(delta)


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
    height = (((weight * size).cumsum(1) - 1) / weight.cumsum(1)).amax(1).clamp_min(0)
    return torch.minimum(torch.maximum(delta, -height[:, None]), height[:, None])


def _two_thirds(delta: Tensor, price: Tensor) -> Tensor:
    size = delta.abs()
    nonzero = size > 2 * (2 / 3 * price) ** 0.75
    square = size.square() / 16
    larger = (square + (square.square() - 8 / 729 * price**3).clamp_min(0).sqrt()).clamp_min(_TINY) ** (1 / 3)
    root = (2 * (larger + 2 / 9 * price / larger)).sqrt()
    far = ((root + (2 * size / root - root.square()).clamp_min(0).sqrt()) / 2) ** 3
    return torch.where(nonzero, far * delta.sign(), 0.0)


_OPERATORS: dict[type[Norm], Callable[[Tensor, Tensor], Tensor]] = {
    L0: _two_thirds,
    L1: _l1,
    L2: _l2,
    Linf: _linf,
}
