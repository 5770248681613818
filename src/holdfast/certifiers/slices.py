"""Slices of a decision boundary: the predicted classes on a grid in a plane through an input."""

import torch
from torch import Tensor

from holdfast.core.model import Bounds, Model
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs

_AT_ONCE = 2048
"""number of points that are classified together"""


def beside(first: Inputs, second: Inputs) -> Inputs:
    """Return the part of each direction `second` (n, *features) that is orthogonal to `first`, in the Euclidean length
    of `first`.

    It is zero if the directions are parallel.
    """
    length = first.flatten(1).norm(dim=1)
    unit = first / spread(length.clamp_min(1e-12), first)
    rest = second - spread((second * unit).flatten(1).sum(1), second) * unit
    size = rest.flatten(1).norm(dim=1)
    parallel = size <= 1e-6 * second.flatten(1).norm(dim=1)
    scaled = rest * spread(length / size.clamp_min(1e-12), rest)
    return torch.where(spread(parallel, scaled), 0.0, scaled)


def boundary_slices(
    model: Model, x: Inputs, across: Inputs, up: Inputs, *, bounds: Bounds, side: int, reach: float
) -> Tensor:
    """Return the predicted classes (n, side, side) at points x + s * across + t * up, int16, for s and t from -reach to
    reach. A point outside the bounds at which class k is predicted has the number -1 - k.

    The first dimension of a grid is t, from `reach` downwards, and the second is s, as in a picture. `side` is odd, so
    that the middle of the grid is the input itself. Costs side^2 forward passes for each input.
    """
    steps = torch.linspace(-reach, reach, side, dtype=x.dtype, device=x.device)
    grids = []
    low, high = bounds.like(x)
    for place in range(len(x)):
        rows = []
        t, s = torch.meshgrid(steps.flip(0), steps, indexing="ij")
        for start in range(0, side * side, _AT_ONCE):
            some_t, some_s = (each.flatten()[start : start + _AT_ONCE] for each in (t, s))
            shape = (-1, *(1,) * (x.dim() - 1))
            points = x[place] + some_s.view(shape) * across[place] + some_t.view(shape) * up[place]
            with torch.no_grad():
                predicted = model(points).argmax(1)
            inside = ((points >= low - 1e-6) & (points <= high + 1e-6)).flatten(1).all(1)
            rows.append(torch.where(inside, predicted, -1 - predicted))
        grids.append(torch.cat(rows).view(side, side).to(torch.int16).cpu())
    return torch.stack(grids) if grids else torch.zeros(0, side, side, dtype=torch.int16)
