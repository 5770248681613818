"""Square Attack: random search with windows, from scores alone.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV 2020,
arXiv:1912.00049; for L1: Croce & Hein, arXiv:2103.01208.
Differs from the paper: each example has its own windows, and they reach the last row and column too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Steps
from holdfast.ops.best import Best
from holdfast.ops.losses import margin
from holdfast.ops.norms import expect_norm
from holdfast.ops.squares import Corners, Heaps, Proposals, share

_BLOCK = 64  # steps whose windows are drawn together, so that few examples cost few operations


@dataclass(frozen=True)
class Square:
    """Try windows that shrink over time, and keep each that lowers the margin."""

    queries: Steps = 5000
    """forwards for each example, at most; the threat model's budget where that is less"""
    p_init: Fraction = 0.8
    """share of the pixels that the first windows cover"""
    scale_schedule: bool = True
    """shrink the windows over the queries there are, not over the paper's 10,000"""

    needs: ClassVar[Access] = "scores"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        norm = expect_norm(threat.constraint, self, Linf, L2, L1)
        assert isinstance(norm, (Linf, L2, L1))
        best = Best(batch)
        if len(batch):
            with torch.no_grad():
                self._search(model, batch, norm, best, min(self.queries, threat.queries or self.queries), rng)
        return best.x

    def _search(
        self, model: Model, left: Batch, norm: Linf | L2 | L1, best: Best, queries: int, rng: Draws
    ) -> None:
        proposals, ids = _proposals(left, norm, model.bounds), left.ids
        height = margin(model(proposals.start(rng.at("start")), ids), left)
        for step in range(queries):
            at = step % _BLOCK
            if at == 0:
                shares = [
                    share(self.p_init, step + k, queries if self.scale_schedule else None)
                    for k in range(_BLOCK)
                ]
                proposals.plan(
                    rng.at("block", step // _BLOCK).uniform(left.ids, _BLOCK, proposals.per_step), shares
                )
            if not float(height.min()) > 0:  # a NaN among them makes the least a NaN
                best.offer(left, proposals.x, height)
                standing = height > 0
                left, height = left.take(standing), height[standing]
                if not len(left):
                    return
                proposals.take(standing)
            if step == queries - 1:
                break
            margins = margin(model(proposals.propose(at), left.ids), left)
            lower = ~(margins >= height)
            proposals.keep(lower)
            height = torch.where(lower, margins, height)
        best.offer(left, proposals.x, height)


def _proposals(batch: Batch, norm: Linf | L2 | L1, bounds: Bounds) -> Proposals:
    return Corners(batch, norm, bounds) if isinstance(norm, Linf) else Heaps(batch, norm, bounds)
