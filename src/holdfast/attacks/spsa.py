"""SPSA (simultaneous perturbation stochastic approximation): a score-based attack that uses Adam on gradients estimated
with random signs.

Uesato, O'Donoghue, van den Oord & Kohli, "Adversarial risk and the dangers of evaluating against weak attacks",
ICML 2018, arXiv:1802.05666; the estimate is that of Spall 1992.
Differs from the paper: step sizes follow a cosine, and Adam's direction is replaced by the steepest step of the
constraint in this direction.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import Adam
from holdfast.attacks.parts.losses import expect_eps
from holdfast.attacks.parts.substitutes import climb, rademacher
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Positive, Steps


@dataclass(frozen=True)
class SPSA:
    """Estimates the gradient from scores at simultaneous random perturbations, and steps along it with Adam."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    pairs: Steps = 25
    """number of pairs of points from which one gradient is estimated"""
    delta: Positive = 0.01
    """displacement of each value to either side, as a fraction of the width of the box"""
    reach: Positive = 20.0
    """path length in multiples of eps"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        if not len(batch):
            return batch.x.clone()
        with torch.no_grad():
            return climb(
                model,
                batch,
                expect_eps(threat.constraint, self),
                rademacher,
                Adam(batch.x),
                queries=min(self.queries, threat.queries or self.queries),
                pairs=self.pairs,
                size=self.delta * model.bounds.width,
                reach=self.reach,
                rng=rng,
            )
