"""An ensemble: a model that averages the logits of several models.

Liu et al., "Delving into Transferable Adversarial Examples and Black-box Attacks", ICLR 2017, arXiv:1611.02770, average
probabilities; Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv:1710.06081, logits, as here.
"""

from dataclasses import dataclass

import torch

from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Logits


@dataclass(frozen=True)
class Ensemble:
    """Model that returns the mean of the logits of several models, for inputs with common bounds."""

    models: tuple[Model, ...]
    bounds: Bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes); cost: one forward of each model."""
        return torch.stack([model(x, ids) for model in self.models]).mean(0)
