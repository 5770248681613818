"""Loss term that immunises a model against stolen parameter sets: the cross-entropy on adversarial examples that were
computed on them.

Tramèr et al., "Ensemble Adversarial Training: Attacks and Defenses", ICLR 2018, arXiv:1705.07204, replace a part of
each batch by adversarial examples of other networks. Differs from the paper: the examples are computed once, on
parameter sets that an attacker may have, and their loss is added to that of the recipe.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.types import Positive, Steps


@dataclass(frozen=True, eq=False)
class Immunity:
    """Adversarial examples that were computed on stolen parameter sets, with the weight of their loss in a training."""

    examples: Batch = field(repr=False)
    """adversarial examples computed on stolen parameter sets, with their original labels"""
    weight: Positive = 0.5
    """weight of the loss of these examples, relative to that of the recipe"""
    batch: Steps = 64
    """number of these examples in each update"""

    def __call__(self, model: nn.Module, rng: Draws) -> Tensor:
        """Return the weighted mean loss of `batch` random examples. Cost: one forward of them."""
        slots = torch.arange(self.batch, device=self.examples.x.device)
        chosen = self.examples.take(rng.at("immunity").integers(slots, len(self.examples)))
        return self.weight * F.cross_entropy(model(chosen.x), chosen.y)
