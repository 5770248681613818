"""Estimate of the normal of a decision boundary from labels at random points around a point of the boundary.

The estimate is that of HopSkipJump (Chen et al., arXiv:1904.02144), with the mean label subtracted.
"""

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, PerExample
from holdfast.ops.decisions import Decisions
from holdfast.ops.directions import directions

_POINTS = 512  # points of one batch, so that they fit the caches
_RESERVE = 10  # queries that an estimate leaves for the step after it


def normal(
    decisions: Decisions, some: Batch, x: Inputs, radius: PerExample, draws: int, rng: Draws, *, share: float
) -> Inputs:
    """Estimate the normal of the decision boundary at `x`, a direction of length one towards broken points, from the
    labels of random points. It is zero if no queries are left.

    It is computed from up to `draws` points at the distance `radius`, in small batches.
    """
    wanted = (decisions.left(some) - _RESERVE).clamp(0, draws)
    sums, counts = x.new_zeros(len(some), 2, x[0].numel()), x.new_zeros(len(some), 2)
    for first in range(0, int(wanted.max()), _POINTS):
        k = min(_POINTS, int(wanted.max()) - first)
        each = (v.split(_POINTS // k) for v in (x[:, None], radius, wanted - first, sums, counts))  # type: ignore[no-untyped-call]
        for few, at, reach, most, total, asked in zip(some.split(_POINTS // k), *each, strict=True):
            u = directions(rng.at(first), few.ids, k, x.shape[1:], share, x.dtype)
            points = torch.addcmul(at, spread(reach, u), u, out=u)  # in place to avoid allocation
            broken, done = decisions.ask_many(few, decisions.bounds.clamp(points, out=points), most)
            signs = torch.stack(((2 * broken.long() - 1) * done, done), 1).to(x.dtype)
            total += signs @ (points - at).flatten(2)
            asked += signs.sum(2)
    mean = counts[:, 0] / counts[:, 1].clamp_min(1)
    towards = sums[:, 0] - torch.where(mean.abs() < 1, mean, 0)[:, None] * sums[:, 1]
    return L2().steepest(towards.view_as(x), x, decisions.bounds)
