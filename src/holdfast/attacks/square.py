"""Square Attack: a score-based attack that changes random square windows of an image and keeps the changes that lower
the margin.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020,
arXiv:1912.00049; for L1: Croce & Hein, arXiv:2103.01208.
Differs from the paper: each example has its own windows, and they reach the last row and column too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.losses import Best, expect_eps, expect_norm
from holdfast.attacks.parts.random_search import proposals_for, search, window_share
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Steps


@dataclass(frozen=True)
class Square:
    """Changes random square windows that shrink over time, and keeps each change that lowers the margin."""

    queries: Steps = 5000
    """largest number of queries for each example; a smaller query budget of the threat model takes precedence"""
    p_init: Fraction = 0.8
    """fraction of the pixels that the first windows cover"""
    scale_schedule: bool = True
    """whether windows shrink over the number of queries instead of the paper's 10,000"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(expect_eps(threat.constraint, self), self, Linf, L2, L1)
        assert isinstance(norm, (Linf, L2, L1))
        best, queries = Best(batch), min(self.queries, threat.queries or self.queries)
        if len(batch):
            proposals = proposals_for(batch, norm, model.bounds)
            proposals.start(rng.at("start"))
            scaled = queries if self.scale_schedule else None
            shares = [window_share(self.p_init, step, scaled) for step in range(queries)]
            with torch.no_grad():
                search(model, batch, proposals, best, shares, rng)
        return best.x
