"""What clients receive of the scores of a model: all digits, a number of decimal digits, or the predicted class."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from holdfast.core.model import Bounds, Model
from holdfast.core.outputs import refused
from holdfast.core.types import Ids, Inputs, Logits

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
    return all_scores if detail == "all" else partial(_rounded, decimals=int(detail))


def _rounded(scores: Tensor, decimals: int) -> Tensor:
    """Return scores with a number of decimal digits. Class numbers are unchanged, as are scores so large that their
    product with a power of ten overflows: these have no decimal digits.
    """
    if not scores.is_floating_point():
        return scores
    rounded = torch.round(scores, decimals=decimals)
    return torch.where(rounded.isfinite(), rounded, scores)


_LEAD = 1e-4  # of the predicted class, which clients know: less than the digits that are released


class Releasing:
    """Model of which an attack receives what a release returns. The predicted class has the largest score also where
    rounded scores are equal, and rejected inputs stay marked.
    """

    def __init__(self, model: Model, release: Release) -> None:
        self._model, self._release = model, release

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self._model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the released scores (n, classes) of the inputs."""
        logits = self._model(x, ids)
        released = self._release(logits) + _LEAD * labels(logits)
        return torch.where(refused(logits)[:, None], logits, released)
