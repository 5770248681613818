"""Energy of the logits, which is high for inputs unlike those of the training.

Liu, Wang, Owens & Li, "Energy-based out-of-distribution detection", NeurIPS 2020, arXiv:2010.03759.
Differs from the paper: the network is not fine-tuned with an energy loss.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.core.types import Positive
from holdfast.guard.detectors.detector_protocol import Need, Observation


@dataclass(frozen=True)
class Energy:
    """The free energy `-T log(sum(exp(logits / T)))` of an input. It needs no further forward pass.

    Logits that are log probabilities have the energy 0 at temperature 1, so that nothing is detected.
    """

    temperature: Positive = 1.0
    """temperature T"""

    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, seen: Observation) -> torch.Tensor:
        """Return the energy (n,) of each input."""
        return -self.temperature * (seen.logits / self.temperature).logsumexp(1)
