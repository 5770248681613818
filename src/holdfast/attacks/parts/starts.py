"""Random starting points of attacks on the surface of a ball, as in AutoAttack."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs


def unit_noise(batch: Batch, constraint: Constraint, rng: Draws) -> Inputs:
    """Return random noise of length one in the norm of the constraint for each example: uniform for Linf, Gaussian
    otherwise.
    """
    shape, dtype = batch.x.shape[1:], batch.x.dtype
    if isinstance(constraint, Linf):
        noise = 2 * rng.uniform(batch.ids, *shape, dtype=dtype) - 1
    else:
        noise = rng.normal(batch.ids, *shape, dtype=dtype)
    return noise / spread(constraint.distance(noise, torch.zeros_like(noise)).clamp_min(1e-12), noise)


def surface(batch: Batch, constraint: Constraint, bounds: Bounds, rng: Draws) -> Inputs:
    """Return a random starting point on the surface of the ball around each clean input, clipped to valid inputs. For
    L1 it is Gaussian noise projected onto the valid inputs of the ball.
    """
    if isinstance(constraint, L1):
        noise = rng.normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    elif isinstance(constraint, (Linf, L2)):
        noise = constraint.eps * unit_noise(batch, constraint, rng)
    else:
        return constraint.sample(batch, bounds, rng)
    return constraint.project(batch.x + noise, batch.x, bounds)
