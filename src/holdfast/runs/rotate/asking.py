"""A search from scores alone against a service that swaps its sets, and whose candidate is carried over every swap.

The windows are those of Square Attack (Andriushchenko et al., ECCV 2020, arXiv:1912.00049). Differs from it: after each
swap the candidate is measured anew on the set that serves then, which costs a query, and no example stops at success,
for what turned one set may not turn the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, Steps
from holdfast.ops.losses import margin
from holdfast.ops.norms import expect_eps, expect_norm
from holdfast.ops.squares import proposals_for, share

_BLOCK = 64  # steps whose windows are drawn together


@dataclass(frozen=True)
class AcrossSwaps:
    """Try windows, and keep each that lowers the margin on the set that serves."""

    queries: Steps = 600
    """answers for each input, all sets together"""
    every: Steps = 50
    """answers after which another set serves"""
    p_init: Fraction = 0.8
    """share of the pixels that the first windows cover; what goes on from an example begins with an eighth of it"""

    @torch.no_grad()
    def __call__(
        self,
        sets: Sequence[Classifier],
        batch: Batch,
        threat: ThreatModel,
        *,
        start: Inputs | None = None,
        rng: Draws,
    ) -> Inputs:
        """Changed inputs. The sets serve in turn, so that the first of them does when the last answer is given."""
        norm = expect_norm(expect_eps(threat.constraint, self), self, Linf, L2, L1)
        assert isinstance(norm, (Linf, L2, L1))
        proposals = proposals_for(batch, norm, sets[0].bounds)
        if start is None:
            proposals.start(rng.at("start"))
        else:
            proposals.x = start.clone()
        first = self.p_init if start is None else self.p_init / 8
        shares = [share(first, step, self.queries) for step in range(self.queries)]
        last = (self.queries - 1) // self.every
        for step in range(self.queries):
            serving = sets[(last - step // self.every) % len(sets)]
            at = step % _BLOCK
            if at == 0:
                block = shares[step : step + _BLOCK]
                draws = rng.at("block", step // _BLOCK).uniform(batch.ids, _BLOCK, proposals.per_step)
                proposals.plan(draws[:, : len(block)], block)
            if step % self.every == 0:  # the first answer of a set looks at what was carried over
                height = margin(serving(proposals.x.clone(), batch.ids), batch)
                continue
            margins = margin(serving(proposals.propose(at), batch.ids), batch)
            lower = ~(margins >= height)
            proposals.keep(lower)
            height = torch.where(lower, margins, height)
        return proposals.x
