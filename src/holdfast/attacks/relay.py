"""Relay: alternates between gradient steps and a random search, each from the best point that both have found so far.

Our own. It makes short runs of gradient descent on the margin from random starts; the same towards the classes with the
nearest linearised boundaries (Melamed et al., "MALT powers up adversarial attacks", NeurIPS 2024, arXiv:2407.02240);
the same from the results of a short Square Attack (Andriushchenko et al., ECCV 2020, arXiv:1912.00049); then, in turn,
small windows of Square Attack from the best point so far, and gradient steps from there. Each of the two methods breaks
examples that the other one alone does not.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import descend
from holdfast.attacks.parts.losses import Best, expect_eps, expect_norm, likeliest
from holdfast.attacks.parts.random_search import proposals_for, search, window_share
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Constraint, Linf
from holdfast.core.draws import Draws
from holdfast.core.gradients import input_gradient
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Count, Fraction, Inputs, Labels, Positive, Steps

_FROM_BEST = 0.6  # factor of the path length of a run that starts from the result of a search


@dataclass(frozen=True)
class Relay:
    """Alternates gradient steps and the random search of Square Attack, each from the best point so far."""

    steps: Steps = 20
    """number of gradient steps of one run"""
    reach: Positive = 10.0
    """path length of one run, in multiples of eps"""
    restarts: Count = 2
    """number of runs from random starts"""
    targets: Count = 2
    """number of runs that each target one class, nearest linearised boundary first"""
    searches: Count = 2
    """number of runs from the results of new random searches"""
    rounds: Count = 2
    """number of runs from the results of random searches that start from the best point so far"""
    queries: Steps = 200
    """number of windows that are tried in each random search"""
    p_init: Fraction = 0.8
    """fraction of the pixels that the first windows of a new random search cover"""
    p_best: Fraction = 0.05
    """fraction of the pixels that the first windows cover in a search from the best point so far"""

    needs: ClassVar[Access] = "gradients"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint, best = expect_eps(threat.constraint, self), Best(batch)
        for restart in range(self.restarts):
            remaining = batch.take(best.surviving)
            start = constraint.sample(remaining, model.bounds, rng.at("restart", restart))
            self._run(model, remaining, start, constraint, best)
        self._aim(model, batch, constraint, best, rng)
        for number in range(self.searches):
            remaining = batch.take(best.surviving)
            searched = Best(remaining)
            self._search(model, remaining, constraint, searched, rng.at("search", number), self.p_init)
            best.offer(remaining, searched.x, searched.margin)
            self._refine(model, remaining, constraint, best, searched)
        self.improve(model, batch, constraint, best, rng)
        return best.x

    def improve(self, model: Model, batch: Batch, constraint: Constraint, best: Best, rng: Draws) -> None:
        """Run the `rounds` of the attack from the points in `best`, and add the points that they find to it."""
        for number in range(self.rounds):
            self._search(model, batch, constraint, best, rng.at("round", number), self.p_best)
            self._refine(model, batch, constraint, best, best)

    def _aim(self, model: Model, batch: Batch, constraint: Constraint, best: Best, rng: Draws) -> None:
        rows = best.surviving
        if not self.targets or batch.target is not None or not len(rows):
            return
        aims = nearest_classes(model, batch.take(rows), constraint, self.targets)
        for rank, aim in enumerate(aims.unbind(1)):
            surviving = best.margin[rows] > 0
            remaining = batch.take(rows[surviving])
            start = constraint.sample(remaining, model.bounds, rng.at("target", rank))
            self._run(model, remaining, start, constraint, best, aim=aim[surviving])

    def _run(
        self,
        model: Model,
        remaining: Batch,
        start: Inputs,
        constraint: Constraint,
        best: Best,
        *,
        aim: Labels | None = None,
        reach: float | None = None,
    ) -> None:
        """Gradient steps from `start`, towards the class `aim` if it is given."""
        if len(remaining):
            run = partial(descend, steps=self.steps, reach=reach or self.reach, aim=aim)
            best.offer(remaining, *run(model, remaining, start, constraint))

    def _refine(self, model: Model, batch: Batch, constraint: Constraint, best: Best, searched: Best) -> None:
        """Gradient steps from the points in `searched`."""
        rows, reach = searched.surviving, _FROM_BEST * self.reach
        self._run(model, batch.take(rows), searched.x[rows], constraint, best, reach=reach)

    def _search(
        self, model: Model, batch: Batch, constraint: Constraint, best: Best, rng: Draws, p_init: float
    ) -> None:
        """Random search from the best points, or from a new start if there are none yet."""
        norm, rows = expect_norm(constraint, self, Linf, L2, L1), best.surviving
        assert isinstance(norm, (Linf, L2, L1))
        if not len(rows):
            return
        remaining = batch.take(rows)
        proposals = proposals_for(remaining, norm, model.bounds)
        # nothing was evaluated yet, so there is no best point to start from
        if best.margin.isinf().all():
            proposals.start(rng.at("start"))
        else:
            proposals.x = best.x[rows]
        shares = [window_share(p_init, step, None) for step in range(self.queries)]
        with torch.no_grad():
            search(model, remaining, proposals, best, shares, rng)


_CANDIDATES = 9  # number of likeliest wrong classes that are compared; all of them if there are ten classes


def nearest_classes(model: Model, batch: Batch, constraint: Constraint, k: int) -> Tensor:
    """Return the `k` wrong classes whose linearised decision boundaries are nearest to each input, nearest first, of
    shape (n, k), or all wrong classes if there are fewer.

    Cost: a forward, and a backward for each of nine classes at most.
    """
    x = batch.x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x, batch.ids)
        rivals = likeliest(logits.detach(), batch.y, _CANDIDATES)
        gaps = logits.gather(1, batch.y[:, None]) - logits.gather(1, rivals)
    distances = []
    for gap in gaps.unbind(1):
        grad = input_gradient(gap, x, retain=True)
        slope = (grad * constraint.steepest(grad, batch.x, model.bounds)).flatten(1).sum(1)
        distances.append(gap.detach() / slope.clamp_min(1e-12))
    order = torch.stack(distances, dim=1).nan_to_num(torch.inf).argsort(dim=1, stable=True)
    return rivals.gather(1, order[:, :k])
