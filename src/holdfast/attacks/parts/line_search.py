"""Last step of minimum-norm attacks: a search for the decision boundary on the line from a broken point to the clean
input.

If eps is finite and the broken point lies outside the ball, the search can instead continue from its projection onto
the ball (our own).
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from holdfast.attacks.parts.ascent import descend, gradient
from holdfast.attacks.parts.closest import Closest, firmly_broken
from holdfast.attacks.parts.losses import margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, Norm
from holdfast.core.model import Model
from holdfast.core.per_example import pick
from holdfast.core.types import Inputs, PerExample

_FORWARDS = 10  # forward passes of the search on the segment to the clean input
_REACH = 5.0  # path length of the descent inside the ball, in multiples of eps
_FIRST = 15 / 16  # first probe of the bisection: a good attack ends within a few percent of the boundary

Shrink = Callable[[PerExample], Inputs]
"""function that returns the points within a given distance of the clean inputs that are most likely to be broken"""


def to_boundary(model: Model, batch: Batch, x_adv: Inputs, norm: Norm, refine: int = 0) -> Inputs:
    """Move the attacked inputs `x_adv` towards the clean inputs as far as they still break the model, and project the
    results onto the ball of `norm`.

    A point moves only to one that breaks the model by more than rounding. Under L0, changes are undone instead, the
    least useful first. Cost: at most ten forwards (under L0, the first with a backward) of the examples that differ
    from the clean ones.

    With `refine` and a finite eps no point is moved towards the clean input: points outside the ball are projected onto
    it, and `refine` gradient steps and a forward then lower their margin inside the ball.
    """
    if refine and norm.eps < math.inf:
        return _refined(model, batch, x_adv, norm, refine)
    changed = (norm.distance(x_adv, batch.x) > 0).nonzero()[:, 0]
    result = x_adv.clone()
    if len(changed):
        subset, points = batch.take(changed), x_adv[changed]
        if isinstance(norm, L0):
            result[changed] = _fewest_changes(model, subset, points, norm)
        else:  # shrink the ball around the clean input
            shrunk = partial(norm.within, points, subset.x, model.bounds)
            result[changed] = _bisected(model, subset, points, norm, shrunk, _FORWARDS)
    return norm.project(result, batch.x, model.bounds)


def _refined(model: Model, batch: Batch, x_adv: Inputs, norm: Norm, steps: int) -> Inputs:
    """Project `x_adv` onto the ball, and lower the margin of the points that were outside it by gradient steps."""
    outside = (norm.distance(x_adv, batch.x) > norm.eps).nonzero()[:, 0]
    result = norm.project(x_adv, batch.x, model.bounds)
    if len(outside):
        subset = batch.take(outside)
        result[outside], _ = descend(model, subset, result[outside], norm, steps=steps, reach=_REACH)
    return result


def _fewest_changes(model: Model, batch: Batch, points: Inputs, norm: L0) -> Inputs:
    """Undo changes in the order of their gradients, least useful first; move the remaining ones to the box's sides."""
    result = points.clone()
    grad, logits = gradient(model, batch.at(points), margin_loss)
    firm = firmly_broken(logits, batch)
    remaining, x, grad = batch.take(firm), points[firm], grad[firm]
    if not len(remaining):
        return result
    low, high = model.bounds.like(x)
    pushed = torch.where(x == remaining.x, x, torch.where(grad > 0, high, torch.where(grad < 0, low, x)))
    with torch.no_grad():
        better = firmly_broken(model(pushed, remaining.ids), remaining)
    x = pick(better, pushed, x)
    gain = torch.where(x == remaining.x, -torch.inf, grad * (x - remaining.x))
    result[firm] = _bisected(
        model,
        remaining,
        x,
        norm,
        lambda radius: torch.where(norm.largest(gain, radius), x, remaining.x),
        _FORWARDS - 2,  # the gradient and the pushed points took two
    )
    return result


def _bisected(
    model: Model, batch: Batch, points: Inputs, norm: Norm, shrink: Shrink, forwards: int
) -> Inputs:
    """The closest of `forwards` points of a bisection that breaks the model; `points` if none does."""
    closest, high = Closest(batch), norm.distance(points, batch.x)
    closest.offer(batch, points, high, high >= 0)
    low, probe = torch.zeros_like(high), _FIRST * high
    with torch.no_grad():
        for _ in range(forwards if len(batch) else 0):
            x = shrink(probe)
            broken, distance = firmly_broken(model(x, batch.ids), batch), norm.distance(x, batch.x)
            closest.offer(batch, x, distance, broken)
            high, low = torch.where(broken, distance, high), torch.where(broken, low, probe)
            probe = (low + high) / 2
    return closest.x
