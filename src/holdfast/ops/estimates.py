"""Estimates of gradients from scores of the model, and gradient descent with these estimates, for score-based attacks.

Estimates use margins at antithetic pairs of points. A queried point also counts as a result if it breaks the model
inside the constraint.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.types import Ids, Inputs, PerExample, Rows
from holdfast.ops.ascent import cosine
from holdfast.ops.best import Best
from holdfast.ops.closest import Closest, firmly_broken
from holdfast.ops.directions import signs
from holdfast.ops.losses import margin

_ROWS = 512
"""largest number of rows of a forward pass, unless one pair for each example needs more"""

Noise = Callable[[Draws, Ids, Inputs], Inputs]
"""function `noise(rng, ids, like)` that returns a random direction for each example"""


class Steering(Protocol):
    """Protocol of an optimiser for gradient estimates: it is called with the estimate of each step and returns the
    direction of the step.
    """

    def __call__(self, gradient: Inputs) -> Inputs:
        """Update with an estimate and return the direction of the next step."""

    def take(self, rows: Rows) -> None:
        """Restrict the state of the optimiser to the given rows of the batch, because the other examples are no longer
        attacked.
        """


def gaussian(rng: Draws, ids: Ids, like: Inputs) -> Inputs:
    """Return standard normal random numbers in the shape of `like`, made in pairs from 64 random bits by the Box-Muller
    transform.
    """
    n = like[0].numel()
    words = rng.bits(ids, -(-n // 2))
    u, v = (((words >> shift) & 0xFFFFFF).to(like.dtype) * 2.0**-24 for shift in (0, 32))
    length, angle = (-2 * torch.log1p(-u)).sqrt_(), 2 * math.pi * v
    return torch.cat((length * angle.cos(), length * angle.sin()), dim=1)[:, :n].view_as(like)


def rademacher(rng: Draws, ids: Ids, like: Inputs) -> Inputs:
    """Return random signs in the shape of `like`, each made from one random bit."""
    return signs(rng, ids, *like.shape[1:], dtype=like.dtype)


def estimated_slope(
    model: Model, left: Batch, x: Inputs, constraint: Constraint, best: Best, noise: Noise,
    *, pairs: int, size: float, rng: Draws,
) -> Inputs:  # fmt: skip
    """Estimate the direction in which the margin falls fastest at `x` from the scores at pairs of opposite points
    around it. The result is minus the gradient, up to a factor.

    It uses `pairs` pairs of points at the distance `size` on either side, which are clamped to the box; differences are
    taken along the line between both points. Cost: two forwards for each pair.
    """
    total, at_once = torch.zeros_like(x), max(1, _ROWS // (2 * len(left)))
    for first in range(0, pairs, at_once):
        lines = []
        for pair in range(first, min(first + at_once, pairs)):
            step = size * noise(rng.at("pair", pair), left.ids, x)
            lines += [model.bounds.clamp(x + step), model.bounds.clamp(x - step)]
        heights = look(model, left, lines, constraint, best)
        for k in range(0, len(lines), 2):
            fall = (heights[k + 1] - heights[k]).nan_to_num(0.0, 0.0, 0.0)
            total += spread(fall, x) * (lines[k] - lines[k + 1])
    return total


def look(
    model: Model, left: Batch, points: list[Inputs], constraint: Constraint, best: Best
) -> list[PerExample]:
    """Query the model at several points of each example and return their margins. Points that break the model inside
    the constraint are recorded in `best`.

    Points that break the model inside the constraint are offered to `best`.
    """
    n = len(points)
    whole = Batch(torch.cat(points), left.y.repeat(n), left.ids.repeat(n), _repeated(left.target, n))
    heights = margin(model(whole.x, whole.ids), whole).view(n, -1).unbind()
    for x, height in zip(points, heights, strict=True):
        rows = (~(height > 0)).nonzero()[:, 0]
        if len(rows):
            rows = rows[allowed(constraint, x[rows], left.x[rows], model.bounds)]
            best.offer(left.take(rows), x[rows], height[rows])
    return list(heights)


def climb(
    model: Model, batch: Batch, constraint: Constraint, noise: Noise, steering: Steering,
    *, queries: int, pairs: int, size: float, reach: float, rng: Draws,
) -> Inputs:  # fmt: skip
    """Lower the margin by gradient descent with estimated gradients, starting from the clean inputs, and return the
    best point of each example.

    Step sizes follow a cosine over a path of `reach` times eps. Cost: at most `queries` forwards, one to evaluate each
    point and two for each pair; the last step uses the remaining queries.
    """
    best, left, x = Best(batch), batch, batch.x
    steps = list(_pairs(queries, pairs))
    for step, most in enumerate([*steps, 0]):
        best.offer(left, x, margin(model(x, left.ids), left))
        if most:
            grad = estimated_slope(
                model, left, x, constraint, best, noise, pairs=most, size=size, rng=rng.at("step", step)
            )
        standing = (best.margin[best.rows(left)] > 0).nonzero()[:, 0]
        if not len(standing) or not most:
            break
        if len(standing) < len(left):
            left, x, grad = left.take(standing), x[standing], grad[standing]
            steering.take(standing)
        length = reach * constraint.eps / len(steps) * cosine(step, len(steps))
        direction = constraint.steepest(steering(grad), x, model.bounds)
        x = constraint.project(x + length * direction, left.x, model.bounds)
    return best.x


def _pairs(queries: int, pairs: int) -> Iterator[int]:
    """Yield the number of pairs of each step; each step's end costs one query, and so does the start."""
    left = queries - 1
    while left >= 3:
        n = min(pairs, (left - 1) // 2)
        yield n
        left -= 2 * n + 1


def coordinate_slopes(
    model: Model, left: Batch, x: Inputs, at: Tensor, norm: Norm, closest: Closest, h: float
) -> Tensor:  # fmt: skip
    """Estimate the derivatives (n, k) of the margin at `x` with respect to the coordinates `at`, by finite differences
    with the step `h`.

    Points that break the model are offered to `closest`. Cost: two forwards for each coordinate.
    """
    slopes, n = [], torch.arange(len(left), device=x.device)
    for part in at.split(max(1, _ROWS // (2 * len(left))), dim=1):  # type: ignore[no-untyped-call]
        k = part.shape[1]
        step = x.new_zeros(*part.shape, x[0].numel()).scatter_(2, part[..., None], h)
        rows = n.repeat_interleave(2 * k)
        moved = torch.cat((step, -step), 1).view(-1, *x.shape[1:])
        whole, queried = left.take(rows), model.bounds.clamp(x[rows] + moved)
        logits = model(queried, whole.ids)
        points = queried.view(len(n), 2 * k, *x.shape[1:])
        far = torch.where(firmly_broken(logits, whole), norm.distance(queried, whole.x), torch.inf)
        near, which = far.view(-1, 2 * k).min(1)
        closest.offer(left, points[n, which], near, near < torch.inf)
        one, other = points.flatten(2).gather(2, part.repeat(1, 2)[..., None])[..., 0].chunk(2, 1)
        high, low = margin(logits, whole).view(-1, 2 * k).chunk(2, 1)
        slopes.append(((high - low) / (one - other).clamp_min(h / 2)).nan_to_num(0.0, 0.0, 0.0))
    return torch.cat(slopes, 1)


def _repeated(target: Tensor | None, n: int) -> Tensor | None:
    return None if target is None else target.repeat(n)
