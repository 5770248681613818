"""What minimum-norm attacks ask of a norm beyond its ball."""

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Norm
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Logits, PerExample
from holdfast.ops.closest import leeway
from holdfast.ops.losses import margin

_USUAL = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}
"""an eps of each norm, as an example in a refusal"""


def expect_norm(constraint: Constraint, attack: object, *kinds: type[Norm]) -> Norm:
    """The constraint, if it is one of the norms that the attack is made for; `UsageError` otherwise."""
    for kind in kinds:
        if isinstance(constraint, kind):
            return constraint
    names = " or ".join(kind.__name__ for kind in kinds)
    raise UsageError(
        f"{type(attack).__name__} minimises {names}; the threat model is {constraint}. "
        f"Choose another threat, or leave the attack out"
    )


def expect_eps(constraint: Constraint, attack: object) -> Constraint:
    """The constraint, if it has an eps; `UsageError` otherwise, for an attack that looks for no smallest change."""
    if constraint.eps < torch.inf:
        return constraint
    norm = type(constraint).__name__.lower()
    raise UsageError(
        f"{type(attack).__name__} looks for any change within eps, and the threat model {norm} has no eps. "
        f"Give one, as in {norm}:{_USUAL.get(norm, '0.5')}, or choose an attack that looks for the smallest change, "
        f"such as FMN"
    )


def farthest(norm: Norm, x: Inputs, bounds: Bounds) -> PerExample:
    """Distance from each input to the corner of the box that is farthest from it."""
    low, high = bounds.like(x)
    return norm.distance(torch.where(high - x > x - low, high, low), x)


def length(gradient: Inputs) -> PerExample:
    """Euclidean length, also of gradients whose squares leave float32."""
    wide = gradient.flatten(1)
    largest = wide.abs().amax(1)
    scaled = wide / largest.clamp_min(torch.finfo(wide.dtype).tiny)[:, None]
    size: PerExample = largest * torch.linalg.vector_norm(scaled, dim=1)
    return size


def gap(norm: Norm, grad: Inputs, logits: Logits, batch: Batch, bounds: Bounds) -> PerExample:
    """First-order distance to just beyond the boundary, by the margin's gradient (of either sign) at `batch.x`."""
    slope = (grad * norm.steepest(grad, batch.x, bounds)).flatten(1).sum(1).abs()
    return (margin(logits, batch).abs() + 2 * leeway(logits)) / slope.clamp_min(1e-30)


def free(grad: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
    """The gradient without the coordinates that stand at a side of the box (to rounding) and would leave it."""
    low, high = bounds.like(x)
    ahead = torch.addcmul(x, grad.sign(), 1e-6 * (high - low))
    return grad * (ahead.clamp(low, high) == ahead)  # four times quicker than filling under a mask
