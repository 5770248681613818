"""Adaptive search: divides a budget of passes among several attacks by successive halving, and ends with a search that
uses labels only.

Our own. Successive halving: Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter
optimization", AISTATS 2016, arXiv:1502.07943; here the arms are attacks, and the reward is the number of examples that
they break. The attacks, with their papers, are in `holdfast.attacks.parts.adaptive_search`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.adaptive_search import COLUMNS, Halving
from holdfast.attacks.parts.losses import expect_eps
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Steps


@dataclass(frozen=True)
class AdaptiveSearch:
    """Compares attacks on a few examples, drops the worse half repeatedly, runs the others on all examples, and ends
    with a search from labels only.
    """

    passes: Steps = 20_000
    """largest number of forward and backward passes for each example, over all methods"""

    methods: tuple[str, ...] = ("features", "stand-in", "margin", "expectation", "square", "labels")
    """methods among which the budget is divided"""

    needs: ClassVar[Access] = "labels"
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    """names of the columns of `itemised`"""

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return self.itemised(model, batch, threat, rng=rng)[0]

    def itemised(
        self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws
    ) -> tuple[Inputs, dict[str, Tensor]]:
        """Return the perturbed inputs, and for each example what each method did, as int64 columns (n).

        `METHOD.state` is an index into `METHOD_STATES`; `METHOD.forwards`, `METHOD.backwards` and `METHOD.broke` count
        passes and broken examples; `draws` is the largest number of draws of an expected gradient, `raised` the number
        of points at which the model raised an error, and `changed` is 1 if the model gave an input another output
        after further queries.
        """
        expect_eps(threat.constraint, self)
        if not len(batch):
            return batch.x, {name: torch.zeros_like(batch.ids) for name in self.columns}
        limit = self.passes if threat.queries is None else min(self.passes, threat.queries)
        return Halving(model, batch, replace(threat, queries=None), limit, rng, self.methods).run()
