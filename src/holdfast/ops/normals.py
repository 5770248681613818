"""The normal of a decision boundary from answers alone: random directions, weighed by what the model says beyond each.

The estimate is that of HopSkipJump (Chen et al., arXiv:1904.02144), with the mean answer taken off.
"""

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.rows import spread
from holdfast.core.types import Inputs, PerExample
from holdfast.ops.decisions import ROWS, Decisions
from holdfast.ops.directions import directions

_RESERVE = 10  # queries that an estimate leaves for the step that follows it


def normal(
    decisions: Decisions, some: Batch, x: Inputs, radius: PerExample, draws: int, rng: Draws, *, share: float
) -> Inputs:
    """The direction, of length one, in which the model gives in around `x`; zero where nothing can be asked.

    From `draws` points at a distance of `radius`, a few examples at a time, so that the points stay in the caches.
    """
    total = torch.zeros_like(x)
    wanted = (decisions.left(some) - _RESERVE).clamp(0, draws)
    for part in torch.arange(len(some), device=x.device).split(max(1, ROWS // draws)):  # type: ignore[no-untyped-call]
        few, at = some.take(part), x[part, None]
        u = directions(rng, few.ids, draws, x.shape[1:], share, x.dtype)
        points = decisions.bounds.clamp(at + spread(radius[part], u) * u)
        broken, asked = decisions.ask_many(few, points, wanted[part])
        answers = (2 * broken.to(x.dtype) - 1) * asked
        mean = answers.sum(1, keepdim=True) / asked.sum(1, keepdim=True).clamp_min(1)
        weights = torch.where(mean.abs() < 1, (answers - mean) * asked, answers)
        total[part] = torch.einsum("nk,nkf->nf", weights, (points - at).flatten(2)).view_as(at[:, 0])
    return L2().steepest(total, x, decisions.bounds)
