"""What clients receive of the scores of a model: all digits, a number of decimal digits, or the predicted class."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Release = Callable[[Tensor], Tensor]
"""function from the scores (n, classes) of a model to those that clients receive"""


def all_scores(scores: Tensor) -> Tensor:
    """Return the scores unchanged."""
    return scores


def labels(scores: Tensor) -> Tensor:
    """Return 1 for the predicted class of each row and 0 for the others. A single column contains class numbers, which
    are returned unchanged.
    """
    if scores.shape[1] == 1:
        return scores
    return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)


def release_of(detail: str) -> Release:
    """Return the function for a setting: `all`, `labels`, or a number of decimal digits."""
    if detail == "labels":
        return labels
    return all_scores if detail == "all" else partial(torch.round, decimals=int(detail))
