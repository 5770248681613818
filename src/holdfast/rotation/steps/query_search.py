"""A score-based attack on a service that swaps its parameter sets. After a swap, it continues from the same inputs.

The windows are those of Square Attack (Andriushchenko et al., ECCV 2020, arXiv:1912.00049). Differs from the paper:
after each swap the margin of the candidate is measured on the new set, which costs a query, and no search stops early,
since an example that is adversarial for one set may not be adversarial for the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from holdfast.attacks.parts.losses import margin
from holdfast.attacks.parts.norms import expect_eps, expect_norm
from holdfast.attacks.parts.squares import proposals_for, window_share
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, Steps

_BLOCK = 64  # steps whose windows are sampled together


@dataclass(frozen=True)
class AcrossSwaps:
    """Square Attack on a service that swaps its parameter sets. It keeps the changes of a window that lower the margin
    on the serving set.
    """

    queries: Steps = 600
    """number of queries for each input, to all sets together"""
    every: Steps = 50
    """number of queries after which the serving set is swapped"""
    p_init: Fraction = 0.8
    """fraction of the pixels in the first windows; divided by eight if the search starts from an adversarial example"""

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
        """Return the changed inputs. The sets serve in turn, in such an order that the first one serves at the last
        query.
        """
        norm = expect_norm(expect_eps(threat.constraint, self), self, Linf, L2, L1)
        assert isinstance(norm, (Linf, L2, L1))
        proposals = proposals_for(batch, norm, sets[0].bounds)
        if start is None:
            proposals.start(rng.at("start"))
        else:
            proposals.x = start.clone()
        first = self.p_init if start is None else self.p_init / 8
        shares = [window_share(first, step, self.queries) for step in range(self.queries)]
        last = (self.queries - 1) // self.every
        for step in range(self.queries):
            serving = sets[(last - step // self.every) % len(sets)]
            at = step % _BLOCK
            if at == 0:
                block = shares[step : step + _BLOCK]
                draws = rng.at("block", step // _BLOCK).uniform(batch.ids, _BLOCK, proposals.per_step)
                proposals.plan(draws[:, : len(block)], block)
            if step % self.every == 0:  # the first query to a set measures the candidate
                height = margin(serving(proposals.x.clone(), batch.ids), batch)
                continue
            margins = margin(serving(proposals.propose(at), batch.ids), batch)
            lower = ~(margins >= height)
            proposals.keep(lower)
            height = torch.where(lower, margins, height)
        return proposals.x
