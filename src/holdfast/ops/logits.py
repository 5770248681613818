"""What logits say beside who wins: the scale that they are on, and whether two sets of them say the same."""

import torch
from torch import Tensor

from holdfast.core.types import Logits, PerExample

_OUT_OF_REACH = 1e4  # below the largest: exp(-1e4) is 0 in every type


def contending(logits: Logits) -> Tensor:
    """Which logits (n, classes) have a part in who wins: finite, and less than 1e4 below the largest.

    A class that is masked out, with minus infinity or a large number, says nothing of the others' scale.
    """
    largest = logits.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return logits.isfinite() & (logits > largest - _OUT_OF_REACH)


def scale(logits: Logits) -> PerExample:
    """The largest absolute logit among those that have a part in who wins; 0 where there is none."""
    return logits.where(contending(logits), 0.0).abs().amax(1)


def change(one: Logits, other: Logits) -> PerExample:
    """Largest difference of each row over the largest logit of all, both without what all classes share.

    A logit that is finite in one and not in the other is a change of 1. Classes that are masked out do not count.
    """
    lost = (one.isfinite() != other.isfinite()).any(1)
    kept = contending(one) | contending(other)
    one, other = (logits.nan_to_num(0.0, 0.0, 0.0).where(kept, 0.0) for logits in (one, other))
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    largest = one.abs().max().clamp_min(1e-12)
    return torch.where(lost, 1.0, ((one - other).abs() / largest).amax(1))
