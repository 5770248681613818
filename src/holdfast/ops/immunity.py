"""A loss term that looks at what leaked: the cross-entropy on examples that were made on other networks.

Tramèr et al., "Ensemble Adversarial Training: Attacks and Defenses", ICLR 2018, arXiv:1705.07204, train on examples of
other networks in place of some of a batch's own. Differs from the paper: the examples are made once, from sets of
parameters that an attacker may hold, and their loss stands beside that of the recipe, whatever it is.
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
    """What a training is to hold against, beside what its recipe attacks it with."""

    examples: Batch = field(repr=False)
    """made on networks that leaked"""
    weight: Positive = 0.5
    """of their loss beside that of the recipe"""
    batch: Steps = 64
    """of them in each update"""

    def __call__(self, model: nn.Module, rng: Draws) -> Tensor:
        """The weighted mean loss of a few of them, drawn for the place. Cost: a forward of as many."""
        slots = torch.arange(self.batch, device=self.examples.x.device)
        few = self.examples.take(rng.at("immunity").integers(slots, len(self.examples)))
        return self.weight * F.cross_entropy(model(few.x), few.y)
