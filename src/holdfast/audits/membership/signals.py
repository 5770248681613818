"""The signal of membership of an example: the logit of the probability of its label, in float64."""

import torch
from torch import Tensor

from holdfast.core.types import Labels

LARGEST = 60.0
"""Largest absolute signal. Probabilities that are stored as floats may be exactly 0 or 1, whose logits are infinite."""


def phi(logits: Tensor, y: Labels) -> Tensor:
    """Return the logit of the probability of the label, `z_y - logsumexp(z_other)`, in float64.

    The logits have the shape (…, n, classes).
    """
    z = logits.double()
    labels = y.expand(z.shape[:-1])[..., None]
    own = z.gather(-1, labels)[..., 0]
    rest = z.scatter(-1, labels, -torch.inf).logsumexp(-1)
    return torch.nan_to_num(own - rest, nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)
