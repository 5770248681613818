"""Predictions of a teacher, which another network learns."""

from copy import deepcopy

import torch

from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Logits


class SoftLabels:
    """Function from inputs to the logits of a fixed teacher. The last result is stored, because the attack on a batch
    and its loss need the same one. Cost: a forward pass of the teacher for each batch.
    """

    def __init__(self, teacher: Classifier) -> None:
        self._teacher = deepcopy(teacher).eval().requires_grad_(False)
        self._inputs: Inputs | None = None
        self._logits: Logits | None = None

    def __call__(self, x: Inputs) -> Logits:
        """Return the logits of the teacher for inputs, without a gradient."""
        if self._inputs is not x or self._logits is None:
            with torch.no_grad():
                self._inputs, self._logits = x, self._teacher(x)
        return self._logits
