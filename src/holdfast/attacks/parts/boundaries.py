"""Approximations of decision boundaries, the exact projection onto them, and searches for them on lines."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.ascent import descend, gradient
from holdfast.attacks.parts.losses import Closest, firmly_broken, leeway, likeliest, margin, margin_loss
from holdfast.attacks.parts.queries import Decisions
from holdfast.attacks.parts.random_search import directions
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Linf, Norm
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Bounds, Model
from holdfast.core.per_example import pick, spread
from holdfast.core.types import Inputs, Labels, Logits, PerExample

_TINY, _HUGE = 1e-30, 1e30
_CLOSE = 1e-5  # share of the distance that may be missing: rounding of sums, far below any overshoot

Flat = Linf | L2 | L1
"""norms that have an exact projection"""


def to_plane(
    points: Tensor, normal: Inputs, height: Tensor, norm: Flat, bounds: Bounds
) -> tuple[Tensor, Tensor]:
    """Return the shortest step from each point (k, n, *features) onto a plane with the given normal (n, *features) that
    stays within valid inputs, and the length of the step (k, n).

    `height` (k, n) is the value at each point of the affine function that is zero on the plane. If the plane does not
    intersect the box, the step leads to the corner of the box that is nearest to the plane. The box must be finite.
    """
    low, high = bounds.like(points)
    side = torch.where(height >= 0, -1.0, 1.0).to(normal.dtype)
    direction = normal.sign() * side.view(*height.shape, *[1] * (normal.dim() - 1))
    # arithmetic instead of torch.where, which is ten times slower with an irregular mask
    room = torch.addcmul((high - low) / 2, direction, (high + low) / 2 - points).clamp_min_(0).flatten(2)
    weight = normal.abs().flatten(1)
    # weights of at most 1, so that their products and sums stay within float32
    scale = weight.amax(1).clamp_min(_TINY)
    weight, rise = weight / scale[:, None], height.abs() / scale
    if isinstance(norm, L1):
        size = _one_by_one(weight, room, rise)
    else:
        size = _together(weight, room, rise, weight if isinstance(norm, L2) else None)
    step = size.view_as(points).mul_(direction)
    return step, _length(step.flatten(2), norm)


def _length(step: Tensor, norm: Flat) -> Tensor:
    """Lengths (k, n) of steps (k, n, features)."""
    if isinstance(norm, L2):
        squared: Tensor = torch.linalg.vecdot(step, step)
        return squared.sqrt()
    return torch.maximum(step.amax(2), -step.amin(2)) if isinstance(norm, Linf) else step.abs().sum(2)


def _dual_size(gradient: Inputs, norm: Flat) -> PerExample:
    """Dual norm: largest change of an affine function with this gradient in a step of length one."""
    size = gradient.flatten(1)
    if isinstance(norm, Linf):
        return size.abs().sum(1)
    return size.norm(dim=1) if isinstance(norm, L2) else size.abs().amax(1)


def _together(weight: Tensor, room: Tensor, rise: Tensor, speed: Tensor | None) -> Tensor:
    """Sizes `min(t*speed, room)` whose weighted sum is `rise`, or all of `room` if that is too small; None is speed 1.

    The sum is concave in t, so that Newton's method from below approaches the root from below; the root is exact once
    the linear piece that contains it is reached.
    """
    drive = weight if speed is None else weight * speed
    reached = torch.linalg.vecdot(room, weight) > rise
    t = torch.where(reached, rise / drive.sum(1).clamp_min(_TINY), _HUGE)
    for _ in range(room.shape[-1] + 1):
        moved = t[..., None] if speed is None else t[..., None] * speed
        size = torch.minimum(room, moved)
        short = (rise - torch.linalg.vecdot(size, weight)) * reached
        if not (short > _CLOSE * rise).any():
            break
        still_moving = (room - size).sign_()
        t = t + short.clamp_min(0) / torch.linalg.vecdot(still_moving, drive).clamp_min(_TINY)
    return size


def _one_by_one(weight: Tensor, room: Tensor, rise: Tensor) -> Tensor:
    """Use all the room of the coordinates with the largest weights, and of the next one as much as `rise` requires."""
    ordered, order = weight.sort(dim=1, descending=True)
    order = order.expand_as(room)
    ordered_room = room.gather(-1, order)
    before = F.pad((ordered * ordered_room)[..., :-1].cumsum(-1), (1, 0))
    size = ((rise[..., None] - before) / ordered.clamp_min(_TINY)).clamp_min(0).minimum(ordered_room)
    return torch.zeros_like(room).scatter_(-1, order, size * ordered.sign())


def plane(model: Model, batch: Batch, aim: Labels | None, norm: Flat) -> tuple[PerExample, Inputs, Logits]:
    """Return the linear approximation of a decision boundary at each input: value and gradient of the gap between the
    logits of the label and of the class `aim`. Also returns all logits.

    Without `aim`, the gap is the margin if the batch has targets, otherwise the one whose plane is closest (one
    backward for each class).
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        label_logit = logits.gather(1, batch.y[:, None])
        if aim is None and batch.target is None:
            return *_closest_plane(x, label_logit - logits, batch.y, norm), logits.detach()
        gap = margin(logits, batch) if aim is None else (label_logit - logits.gather(1, aim[:, None]))[:, 0]
        return gap.detach().nan_to_num(), input_gradient(gap, x), logits.detach()


def _closest_plane(x: Inputs, gaps: Logits, y: Labels, norm: Flat) -> tuple[PerExample, Inputs]:
    height, normal = torch.zeros_like(gaps[:, 0]), torch.zeros_like(x)
    nearest = torch.full_like(height, torch.inf)
    for number, gap in enumerate(gaps.unbind(1)):
        grad = input_gradient(gap, x, retain=True)
        value = gap.detach().nan_to_num()
        distance = (value.abs() / _dual_size(grad, norm).clamp_min(1e-12)).masked_fill(y == number, torch.inf)
        closer = distance < nearest
        height, nearest = torch.where(closer, value, height), torch.where(closer, distance, nearest)
        normal = torch.where(spread(closer, x), grad, normal)
    return height, normal


def rivals_of(logits: Logits, batch: Batch, k: int) -> Tensor:
    """Return for each example the classes that an attack tries to reach, int64 (n, k): the target class if there is
    one, else the `k` wrong classes with the largest logits.
    """
    if batch.target is not None:
        return batch.target[:, None]
    return likeliest(logits, batch.y, k)


def across(
    norm: Norm,
    bounds: Bounds,
    batch: Batch,
    x: Inputs,
    grads: Sequence[Inputs],
    margins: Tensor,
    overshoot: float,
) -> Inputs:
    """Return each point `x` moved just beyond the nearest of several linearised decision boundaries, which are given by
    gradients and logit gaps. It is unchanged if there are none.
    """
    if not grads:
        return x
    best, shift = torch.full_like(margins[:, 0], torch.inf), torch.zeros_like(x)
    beyond = overshoot * norm.distance(x, batch.x)
    for grad, gap in zip(grads, margins.unbind(1), strict=True):
        direction = norm.steepest(grad, x, bounds)
        distance = gap / (grad * direction).flatten(1).sum(1).clamp_min(1e-30)
        nearer, length = distance < best, (1 + overshoot) * distance + beyond
        best = torch.where(nearer, distance, best)
        shift = torch.where(spread(nearer, x), spread(length, x) * direction, shift)
    return bounds.clamp(x + shift)


def planes(model: Model, batch: Batch, x: Inputs, rivals: Tensor) -> tuple[Tensor, list[Inputs]]:
    """Return linear approximations of the decision boundaries at `x`: the absolute gap between the logit of each class
    in `rivals` and the leading logit (n, rivals), and the gradients of these gaps.

    The list of gradients is empty if the logits have none.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        gaps = logits.gather(1, rivals) - _leading(logits, batch)[:, None]
    margins = gaps.detach().abs() + leeway(logits.detach())[:, None]
    single_gaps = gaps.unbind(1) if logits.requires_grad else ()
    return margins, [input_gradient(gap, x, retain=True) for gap in single_gaps]


def _leading(logits: Logits, batch: Batch) -> PerExample:
    """The logit that a rival must exceed: that of the label, or with a target the largest other one."""
    if batch.target is None:
        return logits.gather(1, batch.y[:, None])[:, 0]
    return logits.scatter(1, batch.target[:, None], -torch.inf).amax(1)


_POINTS = 512  # points of one batch, so that they fit the caches
_RESERVE = 10  # queries that an estimate leaves for the step after it


def normal(
    decisions: Decisions, batch: Batch, x: Inputs, radius: PerExample, draws: int, rng: Draws, *, share: float
) -> Inputs:
    """Estimate the normal of the decision boundary at `x`, a direction of length one towards broken points, from the
    labels of random points. It is zero if no queries are left.

    It is computed from up to `draws` points at the distance `radius`, in small batches.
    """
    n_points = (decisions.n_left(batch) - _RESERVE).clamp(0, draws)
    sums, counts = x.new_zeros(len(batch), 2, x[0].numel()), x.new_zeros(len(batch), 2)
    for first in range(0, int(n_points.max()), _POINTS):
        k = min(_POINTS, int(n_points.max()) - first)
        pieces = (v.split(_POINTS // k) for v in (x[:, None], radius, n_points - first, sums, counts))  # type: ignore[no-untyped-call]
        for piece, point, distance, n_piece, total, count in zip(
            batch.split(_POINTS // k), *pieces, strict=True
        ):
            u = directions(rng.at(first), piece.ids, k, x.shape[1:], share, x.dtype)
            points = torch.addcmul(point, spread(distance, u), u, out=u)  # in place to avoid allocation
            broken, queried = decisions.ask_many(piece, decisions.bounds.clamp(points, out=points), n_piece)
            signs = torch.stack(((2 * broken.long() - 1) * queried, queried), 1).to(x.dtype)
            total += signs @ (points - point).flatten(2)
            count += signs.sum(2)
    mean = counts[:, 0] / counts[:, 1].clamp_min(1)
    # if all labels are equal, subtracting their mean would leave nothing
    towards = sums[:, 0] - torch.where(mean.abs() < 1, mean, 0)[:, None] * sums[:, 1]
    return L2().steepest(towards.view_as(x), x, decisions.bounds)


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
