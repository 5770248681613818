"""Estimates of gradients from scores of the model, and gradient descent with these estimates, for score-based attacks.

Estimates use margins at antithetic pairs of points. A queried point also counts as a result if it breaks the model
inside the constraint.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.best import Best
from holdfast.attacks.parts.closest import Closest, firmly_broken
from holdfast.attacks.parts.directions import signs
from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.per_example import spread
from holdfast.core.types import Ids, Inputs, PerExample, Rows

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
    random_bits = rng.bits(ids, -(-n // 2))
    # 24 bits, the precision of float32
    u, v = (((random_bits >> shift) & 0xFFFFFF).to(like.dtype) * 2.0**-24 for shift in (0, 32))
    length, angle = (-2 * torch.log1p(-u)).sqrt_(), 2 * math.pi * v  # u may be 0, but never 1
    return torch.cat((length * angle.cos(), length * angle.sin()), dim=1)[:, :n].view_as(like)


def rademacher(rng: Draws, ids: Ids, like: Inputs) -> Inputs:
    """Return random signs in the shape of `like`, each made from one random bit."""
    return signs(rng, ids, *like.shape[1:], dtype=like.dtype)


def estimated_slope(
    model: Model, batch: Batch, x: Inputs, constraint: Constraint, best: Best, noise: Noise,
    *, pairs: int, size: float, rng: Draws,
) -> Inputs:  # fmt: skip
    """Estimate the direction in which the margin falls fastest at `x` from the scores at pairs of opposite points
    around it. The result is minus the gradient, up to a factor.

    It uses `pairs` pairs of points at the distance `size` on either side, which are clamped to the box; differences are
    taken along the line between both points. Cost: two forwards for each pair.
    """
    total, n_pairs = torch.zeros_like(x), max(1, _ROWS // (2 * len(batch)))
    for first in range(0, pairs, n_pairs):
        points = []
        for pair in range(first, min(first + n_pairs, pairs)):
            step = size * noise(rng.at("pair", pair), batch.ids, x)
            points += [model.bounds.clamp(x + step), model.bounds.clamp(x - step)]
        margins = look(model, batch, points, constraint, best)
        for k in range(0, len(points), 2):
            # a margin of NaN or infinity shows no direction
            decrease = (margins[k + 1] - margins[k]).nan_to_num(0.0, 0.0, 0.0)
            total += spread(decrease, x) * (points[k] - points[k + 1])
    return total


def look(
    model: Model, batch: Batch, points: list[Inputs], constraint: Constraint, best: Best
) -> list[PerExample]:
    """Query the model at several points of each example and return their margins. Points that break the model inside
    the constraint are recorded in `best`.
    """
    n = len(points)
    repeated = Batch(torch.cat(points), batch.y.repeat(n), batch.ids.repeat(n), _repeated(batch.target, n))
    all_margins = margin(model(repeated.x, repeated.ids), repeated).view(n, -1).unbind()
    for x, margins in zip(points, all_margins, strict=True):
        rows = (~(margins > 0)).nonzero()[:, 0]
        if len(rows):
            rows = rows[allowed(constraint, x[rows], batch.x[rows], model.bounds)]
            best.offer(batch.take(rows), x[rows], margins[rows])
    return list(all_margins)


def climb(
    model: Model, batch: Batch, constraint: Constraint, noise: Noise, steering: Steering,
    *, queries: int, pairs: int, size: float, reach: float, rng: Draws,
) -> Inputs:  # fmt: skip
    """Lower the margin by gradient descent with estimated gradients, starting from the clean inputs, and return the
    best point of each example.

    Step sizes follow a cosine over a path of `reach` times eps. Cost: at most `queries` forwards, one to evaluate each
    point and two for each pair; the last step uses the remaining queries.
    """
    best, remaining, x = Best(batch), batch, batch.x
    steps = list(_pairs(queries, pairs))
    for step, n_pairs in enumerate([*steps, 0]):  # the last round only evaluates the end point
        best.offer(remaining, x, margin(model(x, remaining.ids), remaining))
        if n_pairs:
            grad = estimated_slope(
                model,
                remaining,
                x,
                constraint,
                best,
                noise,
                pairs=n_pairs,
                size=size,
                rng=rng.at("step", step),
            )
        surviving = (best.margin[best.rows(remaining)] > 0).nonzero()[:, 0]
        if not len(surviving) or not n_pairs:
            break
        if len(surviving) < len(remaining):
            remaining, x, grad = remaining.take(surviving), x[surviving], grad[surviving]
            steering.take(surviving)
        length = reach * constraint.eps / len(steps) * cosine(step, len(steps))
        direction = constraint.steepest(steering(grad), x, model.bounds)
        x = constraint.project(x + length * direction, remaining.x, model.bounds)
    return best.x


def _pairs(queries: int, pairs: int) -> Iterator[int]:
    """Yield the number of pairs of each step; each step's end costs one query, and so does the start."""
    queries_left = queries - 1
    while queries_left >= 3:
        n = min(pairs, (queries_left - 1) // 2)
        yield n
        queries_left -= 2 * n + 1


def coordinate_slopes(
    model: Model, batch: Batch, x: Inputs, at: Tensor, norm: Norm, closest: Closest, h: float
) -> Tensor:  # fmt: skip
    """Estimate the derivatives (n, k) of the margin at `x` with respect to the coordinates `at`, by finite differences
    with the step `h`.

    Points that break the model are offered to `closest`. Cost: two forwards for each coordinate.
    """
    slopes, n = [], torch.arange(len(batch), device=x.device)
    for coordinates in at.split(max(1, _ROWS // (2 * len(batch))), dim=1):  # type: ignore[no-untyped-call]
        k = coordinates.shape[1]
        step = x.new_zeros(*coordinates.shape, x[0].numel()).scatter_(2, coordinates[..., None], h)
        rows = n.repeat_interleave(2 * k)
        shifts = torch.cat((step, -step), 1).view(-1, *x.shape[1:])
        repeated, queried = batch.take(rows), model.bounds.clamp(x[rows] + shifts)
        logits = model(queried, repeated.ids)
        points = queried.view(len(n), 2 * k, *x.shape[1:])
        distances = torch.where(
            firmly_broken(logits, repeated), norm.distance(queried, repeated.x), torch.inf
        )
        nearest, index = distances.view(-1, 2 * k).min(1)
        closest.offer(batch, points[n, index], nearest, nearest < torch.inf)
        x_plus, x_minus = points.flatten(2).gather(2, coordinates.repeat(1, 2)[..., None])[..., 0].chunk(2, 1)
        high, low = margin(logits, repeated).view(-1, 2 * k).chunk(2, 1)
        # at a side of the box one point does not move; in a box without width neither does
        slopes.append(((high - low) / (x_plus - x_minus).clamp_min(h / 2)).nan_to_num(0.0, 0.0, 0.0))
    return torch.cat(slopes, 1)


def _repeated(target: Tensor | None, n: int) -> Tensor | None:
    return None if target is None else target.repeat(n)
