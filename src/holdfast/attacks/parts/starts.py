"""Random points around examples: on the surface of the ball, as in AutoAttack, and others from which an attack
learns.
"""

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


def near(
    active: Batch, batch: Batch, constraint: Constraint, bounds: Bounds, kind: int, rng: Draws
) -> Inputs:
    """Return a random valid input near each example of `active`, from which an attack learns about the model.

    By `kind` in turn, it is on the surface of the ball, inside it, and on the way to another example of `batch`, which
    every second time is shortened to the ball.
    """
    if kind % 3 == 0:
        return surface(active, constraint, bounds, rng)
    if kind % 3 == 1:
        return constraint.sample(active, bounds, rng)
    others = batch.x[rng.at("other").integers(active.ids, len(batch))]
    share = spread(rng.at("share").uniform(active.ids, 1, dtype=batch.x.dtype)[:, 0], batch.x)
    mixed: Inputs = torch.lerp(active.x, others, share)
    return mixed if kind % 2 else constraint.project(mixed, active.x, bounds)
