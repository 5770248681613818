"""Scale of the logits of a model, and the relative difference between two sets of logits."""

import torch
from torch import Tensor

from holdfast.core.types import Logits, PerExample

SAME = 1e-4
"""largest change of the outputs of a deterministic model for equal inputs, relative to the largest logit"""
_OUT_OF_REACH = 1e4  # below the largest: exp(-1e4) is 0 in every type


def contending(logits: Logits) -> Tensor:
    """Return a mask of the logits (n, classes) that can affect the prediction. These are finite and less than 1e4 below
    the largest logit of their row.

    A class that is masked out, with minus infinity or a large negative number, does not affect the scale of the others.
    """
    largest = logits.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return logits.isfinite() & (logits > largest - _OUT_OF_REACH)


def scale(logits: Logits) -> PerExample:
    """Return for each row of logits the largest absolute value among the logits that can affect the prediction, or 0 if
    there is none.
    """
    return logits.where(contending(logits), 0.0).abs().amax(1)


def change(first: Logits, second: Logits) -> PerExample:
    """Return for each row the largest difference between two sets of logits, divided by the largest logit of all rows.

    Row means are subtracted first. A logit that is finite in only one of both counts as a change of 1. Classes that are
    masked out do not count.
    """
    lost = (first.isfinite() != second.isfinite()).any(1)
    relevant = contending(first) | contending(second)
    first, second = (logits.nan_to_num(0.0, 0.0, 0.0).where(relevant, 0.0) for logits in (first, second))
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    largest = first.abs().max().clamp_min(1e-12)
    return torch.where(lost, 1.0, ((first - second).abs() / largest).amax(1))
