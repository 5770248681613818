"""Last step of minimum-norm attacks: a search for the decision boundary on the line from a broken point to the clean
input.

If eps is finite and the broken point lies outside the ball, the search can instead continue from its projection onto
the ball (our own).
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, Norm
from holdfast.core.model import Model
from holdfast.core.per_example import pick
from holdfast.core.types import Inputs, PerExample
from holdfast.ops.ascent import descend, gradient
from holdfast.ops.closest import Closest, firmly_broken
from holdfast.ops.losses import margin_loss

_FORWARDS = 10
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
    moved = (norm.distance(x_adv, batch.x) > 0).nonzero()[:, 0]
    result = x_adv.clone()
    if len(moved):
        some, far = batch.take(moved), x_adv[moved]
        if isinstance(norm, L0):
            result[moved] = _fewest(model, some, far, norm)
        else:  # shrink the ball around the clean input
            shrunk = partial(norm.within, far, some.x, model.bounds)
            result[moved] = _bisected(model, some, far, norm, shrunk, _FORWARDS)
    return norm.project(result, batch.x, model.bounds)


def _refined(model: Model, batch: Batch, x_adv: Inputs, norm: Norm, steps: int) -> Inputs:
    """Project `x_adv` onto the ball, and lower the margin of the points that were outside it by gradient steps."""
    beyond = (norm.distance(x_adv, batch.x) > norm.eps).nonzero()[:, 0]
    result = norm.project(x_adv, batch.x, model.bounds)
    if len(beyond):
        some = batch.take(beyond)
        result[beyond], _ = descend(model, some, result[beyond], norm, steps=steps, reach=_REACH)
    return result


def _fewest(model: Model, batch: Batch, far: Inputs, norm: L0) -> Inputs:
    """Undo changes in the order of their gradients, least useful first; move the remaining ones to the box's sides."""
    result = far.clone()
    grad, logits = gradient(model, batch.at(far), margin_loss)
    firm = firmly_broken(logits, batch)
    left, distance, grad = batch.take(firm), far[firm], grad[firm]
    if not len(left):
        return result
    low, high = model.bounds.like(distance)
    pushed = torch.where(
        distance == left.x, distance, torch.where(grad > 0, high, torch.where(grad < 0, low, distance))
    )
    with torch.no_grad():
        better = firmly_broken(model(pushed, left.ids), left)
    distance = pick(better, pushed, distance)
    gain = torch.where(distance == left.x, -torch.inf, grad * (distance - left.x))
    result[firm] = _bisected(
        model,
        left,
        distance,
        norm,
        lambda radius: torch.where(norm.largest(gain, radius), distance, left.x),
        _FORWARDS - 2,
    )
    return result


def _bisected(model: Model, batch: Batch, far: Inputs, norm: Norm, shrink: Shrink, forwards: int) -> Inputs:
    """The closest of `forwards` points of a bisection that breaks the model; `far` if none does."""
    closest, high = Closest(batch), norm.distance(far, batch.x)
    closest.offer(batch, far, high, high >= 0)
    low, probe = torch.zeros_like(high), _FIRST * high
    with torch.no_grad():
        for _ in range(forwards if len(batch) else 0):
            x = shrink(probe)
            broken, distance = firmly_broken(model(x, batch.ids), batch), norm.distance(x, batch.x)
            closest.offer(batch, x, distance, broken)
            high, low = torch.where(broken, distance, high), torch.where(broken, low, probe)
            probe = (low + high) / 2
    return closest.x
