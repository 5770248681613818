"""Gradients with respect to inputs, for attacks that must go on whatever the model returns."""

import torch

from holdfast.core.types import Inputs, PerExample


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
