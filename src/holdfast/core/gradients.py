"""Gradients with respect to inputs that are defined for every model output."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.constraints import Constraint
from holdfast.core.errors import TargetError
from holdfast.core.model import Bounds
from holdfast.core.per_example import spread
from holdfast.core.refusals import CUTS
from holdfast.core.remedies import Remedy
from holdfast.core.types import Inputs, Labels, Logits, PerExample


def input_gradient(value: PerExample, x: Inputs, *, retain: bool = False, raw: bool = False) -> Inputs:
    """Return the gradient of the sum of `value` with respect to the inputs `x`. It is zero if there is no dependence,
    and NaN and infinity are replaced by zero.

    With `retain`, the graph is retained for another gradient; with `raw`, NaN and infinity are not replaced. Cost: one
    backward.
    """
    if not value.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=retain, materialize_grads=True)
    # not in place: the gradient of a sum is one number, expanded
    return grad if raw else grad.nan_to_num(0.0, 0.0, 0.0)


def levelled(grad: Inputs) -> Inputs:
    """Return the gradient of each example divided by its mean absolute value, for attacks with momentum. Dong et al.
    2018 divide by the L1 norm instead.
    """
    return grad / spread(grad.flatten(1).abs().mean(1).clamp_min(1e-12), grad)


def sloped(net: Callable[[Inputs], Logits], x: Inputs, y: Labels) -> tuple[Inputs, Logits, PerExample]:
    """Compute a forward pass whose loss can be differentiated with respect to the inputs. Returns a leaf tensor equal
    to `x`, the logits, and the cross-entropy of each example.
    """
    leaf = x.detach().requires_grad_()
    logits = net(leaf)
    return leaf, logits, F.cross_entropy(logits, y, reduction="none")


def gradient_of(value: Tensor, x: Inputs, *, graph: bool = True) -> Inputs:
    """Return the gradient of the sum of `value` with respect to `x` for use in a loss. With `graph`, the result can be
    differentiated again.

    The graph is retained for another gradient. Raises `TargetError` if `value` does not depend on `x`. Cost: one
    backward.
    """
    grad: Inputs | None = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(
            value.sum(), x, retain_graph=True, create_graph=graph, allow_unused=True
        )
    if grad is None:
        raise TargetError(
            f"no gradient reaches the input of this network, and the recipe needs it; remove what stops it ({CUTS})",
            Remedy("recipe", "standard"),
        )
    return grad


def rise(value: PerExample, x: Inputs, constraint: Constraint, bounds: Bounds) -> PerExample:
    """Return the first-order increase of `value` for each example in a step of length eps, which is eps times the dual
    norm of the gradient.

    Under L1, where the steepest step changes a hundredth of the features, the mean of that hundredth of the largest
    slopes replaces the dual norm. The result is differentiable, so that it can be a penalty. Cost: one backward, and
    another when it is differentiated.
    """
    grad = gradient_of(value, x)
    climb = constraint.steepest(grad.detach(), x.detach(), bounds)
    added: PerExample = constraint.eps * (grad * climb).flatten(1).sum(1)
    return added
