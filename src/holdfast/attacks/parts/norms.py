"""Functions that depend on a norm and that attacks use, such as the distance to a linearised decision boundary."""

import torch

from holdfast.attacks.parts.closest import leeway
from holdfast.attacks.parts.losses import margin
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, Norm
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Logits, PerExample

_USUAL = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}
"""example eps of each norm for error messages"""


def expect_norm(constraint: Constraint, attack: object, *kinds: type[Norm]) -> Norm:
    """Return the constraint if it is one of the norms that an attack supports. Raises `UsageError` otherwise."""
    for kind in kinds:
        if isinstance(constraint, kind):
            return constraint
    names = " or ".join(kind.__name__ for kind in kinds)
    raise UsageError(
        f"{type(attack).__name__} minimises {names}; the threat model is {constraint}. "
        f"Choose another threat, or leave the attack out"
    )


def expect_eps(constraint: Constraint, attack: object) -> Constraint:
    """Return the constraint if it has a finite eps, for attacks that need one. Raises `UsageError` otherwise."""
    if constraint.eps < torch.inf:
        return constraint
    norm = constraint.name
    raise UsageError(
        f"{type(attack).__name__} searches for any change within eps, and the threat model {norm} has no eps. "
        f"Give one, as in {norm}:{_USUAL.get(norm, '0.5')}, or choose an attack that searches for the smallest change, "
        f"such as FMN"
    )


def farthest(norm: Norm, x: Inputs, bounds: Bounds) -> PerExample:
    """Return the distance from each input to the farthest valid input."""
    low, high = bounds.like(x)
    return norm.distance(torch.where(high - x > x - low, high, low), x)


def length(gradient: Inputs) -> PerExample:
    """Return the Euclidean length of the gradient of each example, without overflow or underflow of the squares in
    float32.
    """
    flat = gradient.flatten(1)
    largest = flat.abs().amax(1)
    scaled = flat / largest.clamp_min(torch.finfo(flat.dtype).tiny)[:, None]
    size: PerExample = largest * torch.linalg.vector_norm(scaled, dim=1)
    return size


def gap(norm: Norm, grad: Inputs, logits: Logits, batch: Batch, bounds: Bounds) -> PerExample:
    """Return the first-order estimate of the distance from each input to the decision boundary, computed from the
    margin and its gradient.
    """
    slope = (grad * norm.steepest(grad, batch.x, bounds)).flatten(1).sum(1).abs()
    # beyond the boundary, because a margin within rounding does not count as broken
    return (margin(logits, batch).abs() + 2 * leeway(logits)) / slope.clamp_min(1e-30)


def free(grad: Inputs, x: Inputs, bounds: Bounds) -> Inputs:
    """Return the gradient with zeros for the input values that are at the limit of their valid range and that a step
    along the gradient would move out of it.
    """
    low, high = bounds.like(x)
    ahead = torch.addcmul(x, grad.sign(), 1e-6 * (high - low))
    return grad * (ahead.clamp(low, high) == ahead)  # four times faster than masked_fill
