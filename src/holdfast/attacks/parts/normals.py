"""Estimate of the normal of a decision boundary from labels at random points around a point of the boundary.

The estimate is that of HopSkipJump (Chen et al., arXiv:1904.02144), with the mean label subtracted.
"""

import torch

from holdfast.attacks.parts.directions import directions
from holdfast.attacks.parts.label_search import Decisions
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, PerExample

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
