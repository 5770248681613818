"""STRIP: inputs whose predicted class remains although other images are laid over them probably have a trigger.

Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019, arXiv:1902.06531.

As in the paper, the images are added. The mean of both, which is also in use, halves a trigger: on networks with
triggers that the benchmark does not contain, its AUROC was 0.79 to 0.97, and that of the sum 0.97 to 1.00.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.types import Fraction, Ids, Inputs, PerExample, Steps
from holdfast.statistics.detection_rates import threshold

_ROWS = 1024
"""Number of blended inputs in one forward pass."""


@dataclass(frozen=True)
class Strip:
    """Scores inputs by the mean entropy of the predictions for the sum of an input and a clean example, clamped to the
    valid range.
    """

    overlays: Steps = 64
    """number of clean examples that are laid over each input"""
    false_positives: Fraction = 0.01
    """share of clean inputs below the threshold"""

    @torch.no_grad()
    def entropy(self, model: Classifier, x: Inputs, ids: Ids, clean: Inputs, *, rng: Draws) -> PerExample:
        """Return the mean entropy of each input, in nats. It is low if the predicted class does not depend on the
        overlay. Costs `overlays` forward passes for each input.
        """
        chosen = rng.at("overlays").integers(ids, len(clean), self.overlays)
        low, _ = model.bounds.like(x)

        def blended(rows: Tensor) -> Inputs:
            return model.bounds.clamp(x[rows, None] + (clean[chosen[rows]] - low)).flatten(0, 1)

        entropies = [
            _entropy(model(blended(rows))).view(-1, self.overlays).mean(1)
            for rows in torch.split(torch.arange(len(x), device=x.device), max(1, _ROWS // self.overlays))
        ]
        return torch.cat(entropies)

    def threshold(self, clean: PerExample) -> float:
        """Return the entropy below which an input is suspect, from the entropies of clean inputs."""
        return -threshold(-clean, self.false_positives)


def _entropy(logits: Tensor) -> PerExample:
    logs = log_softmax(logits.double(), 1)
    return -(logs.exp() * logs).sum(1)
