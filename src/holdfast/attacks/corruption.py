"""Corruption: one common corruption, such as fog or JPEG compression, independent of the model.

Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
arXiv:1903.12261. Differs from the published data sets: see `holdfast.corruptions`.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.names import CorruptionName
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs
from holdfast.corruptions import corrupted


@dataclass(frozen=True)
class Corruption:
    """Applies one common corruption at the severity of the threat model, without queries of the model."""

    name: CorruptionName = "gaussian_noise"
    """name of the corruption, as in the paper; the last four names are not part of the suite"""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = threat.constraint
        if not constraint.drawn_at_random:
            raise UsageError(
                f"{self.name} is a common corruption; the threat model is {constraint}. "
                f"Choose a threat such as corruptions:3"
            )
        return corrupted(self.name, batch.x, int(constraint.eps), batch.ids, rng, model.bounds)
