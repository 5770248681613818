"""NES (natural evolution strategies): a score-based attack that lowers the margin with gradients estimated from pairs
of opposite Gaussian samples.

Ilyas, Engstrom, Athalye & Lin, "Black-box adversarial attacks with limited queries and information", ICML 2018,
arXiv:1804.08598. Differs from the paper: it uses the margin instead of the cross-entropy, step sizes follow a cosine
and do not fall when the loss stalls, and steps are the steepest of the constraint.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.losses import expect_eps
from holdfast.attacks.parts.substitutes import climb, gaussian
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Positive, Rows, Steps


@dataclass(frozen=True)
class NES:
    """Estimates the gradient from scores at antithetic Gaussian samples (natural evolution strategies)."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    pairs: Steps = 25
    """number of pairs of points from which one gradient is estimated"""
    sigma: Positive = 0.001
    """standard deviation of the points around the current one, as a fraction of the width of the box"""
    momentum: Fraction = 0.9
    """factor of the sum of earlier estimates in each step"""
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
                gaussian,
                _Momentum(self.momentum),
                queries=min(self.queries, threat.queries or self.queries),
                pairs=self.pairs,
                size=self.sigma * model.bounds.width,
                reach=self.reach,
                rng=rng,
            )


class _Momentum:
    """The decaying sum of the estimates."""

    def __init__(self, decay: float) -> None:
        self._decay, self._sum = decay, torch.zeros(())

    def __call__(self, gradient: Inputs) -> Inputs:
        self._sum = self._decay * self._sum.to(gradient) + gradient
        return self._sum

    def take(self, rows: Rows) -> None:
        self._sum = self._sum[rows] if self._sum.dim() else self._sum
