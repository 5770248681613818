"""Random starts on the surface of a ball, as in AutoAttack."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs


def unit_noise(batch: Batch, constraint: Constraint, rng: Draws) -> Inputs:
    """Return noise of length one in the constraint's norm: uniform for Linf, Gaussian otherwise."""
    shape, dtype = batch.x.shape[1:], batch.x.dtype
    if isinstance(constraint, Linf):
        noise = 2 * rng.uniform(batch.ids, *shape, dtype=dtype) - 1
    else:
        noise = rng.normal(batch.ids, *shape, dtype=dtype)
    return noise / spread(constraint.distance(noise, torch.zeros_like(noise)).clamp_min(1e-12), noise)


def surface(batch: Batch, constraint: Constraint, bounds: Bounds, rng: Draws) -> Inputs:
    """Return a random point on the ball's surface, clipped to the box; for L1, Gaussian noise projected onto both."""
    if isinstance(constraint, L1):
        noise = rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    elif isinstance(constraint, (Linf, L2)):
        noise = constraint.eps * unit_noise(batch, constraint, rng)
    else:
        return constraint.sample(batch, bounds, rng)
    return constraint.project(batch.x + noise, batch.x, bounds)
