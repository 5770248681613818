"""Gradients with respect to inputs, for attacks that must go on whatever the model returns."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.constraints import Constraint
from holdfast.core.errors import TargetError
from holdfast.core.model import Bounds
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs, Labels, Logits, PerExample
from holdfast.ops.refusals import CUTS


def input_gradient(value: PerExample, x: Inputs, *, again: bool = False, raw: bool = False) -> Inputs:
    """Gradient of the summed `value`: zero where `x` has no part in it, and in place of NaN and infinity.

    With `again`, another gradient of the same pass may follow; with `raw`, NaN and infinity are left in it. Cost: one
    backward.
    """
    if not value.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=again, materialize_grads=True)
    # not in place: the gradient of a sum is one number, expanded
    return grad if raw else grad.nan_to_num(0.0, 0.0, 0.0)


def levelled(grad: Inputs) -> Inputs:
    """Each example's gradient over its mean absolute value, as in Dong et al. 2018, up to a constant."""
    return grad / spread(grad.flatten(1).abs().mean(1).clamp_min(1e-12), grad)


def sloped(net: Callable[[Inputs], Logits], x: Inputs, y: Labels) -> tuple[Inputs, Logits, PerExample]:
    """A leaf at `x`, the logits there, and each example's cross-entropy, whose slope in the leaf may be taken."""
    leaf = x.detach().requires_grad_()
    logits = net(leaf)
    return leaf, logits, F.cross_entropy(logits, y, reduction="none")


def slope(value: Tensor, x: Inputs, *, graph: bool = True) -> Inputs:
    """Gradient of the summed `value`, which a loss holds; with `graph` the loss may be differentiated through it.

    Another gradient of the same pass may follow. Raises `TargetError` where `x` has no part in it. Cost: one backward.
    """
    grad: Inputs | None = None
    if value.requires_grad:
        (grad,) = torch.autograd.grad(
            value.sum(), x, retain_graph=True, create_graph=graph, allow_unused=True
        )
    if grad is None:
        raise TargetError(
            "no gradient reaches the input of this network, and the recipe needs it; take out what cuts it "
            f"({CUTS}), or choose --recipe standard"
        )
    return grad


def rise(value: PerExample, x: Inputs, constraint: Constraint, bounds: Bounds) -> PerExample:
    """What a step of length eps adds to `value` to first order: eps times the slope in the dual norm.

    Under L1, whose steepest step goes over a hundredth of the features, the mean of as many of the largest slopes. It
    has a graph of its own, so that it may be a penalty. Cost: one backward, another where it is differentiated.
    """
    grad = slope(value, x)
    climb = constraint.steepest(grad.detach(), x.detach(), bounds)
    added: PerExample = constraint.eps * (grad * climb).flatten(1).sum(1)
    return added
