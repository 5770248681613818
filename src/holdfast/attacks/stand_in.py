"""StandIn: a small network is trained on the model's answers and attacked with gradients; queries of the model decide.

Papernot et al., "Practical black-box attacks against machine learning", AsiaCCS 2017, arXiv:1602.02697; as the gradient
of a model that hides its own: Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security", ICML
2018, arXiv:1802.00420 (BPDA), and Tramèr et al., "On adaptive attacks to adversarial example defenses", NeurIPS 2020,
arXiv:2002.08347. Differs from Papernot et al.: the network is trained around the attacked examples instead of on
synthetic data for the whole task, and again on the points of each round of the attack.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from holdfast.attacks.parts.ascent import cosine, gradient, near
from holdfast.attacks.parts.boundaries import DOUBLE_CHECKS, CountedQueries
from holdfast.attacks.parts.losses import (
    Loss,
    expect_eps,
    expect_norm,
    likeliest,
    margin,
    margin_loss,
    scaled_cross_entropy,
)
from holdfast.attacks.parts.substitutes import SmallNetwork
from holdfast.attacks.square import Square
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Labels, Logits, PerExample, Steps

LEAST_PASSES = 60
"""Smallest number of queries for each example from which a network is trained: with fewer, more than half of them would
serve the training alone."""
_FIRST = (0.125, 40)
"""share of the queries for the first training, and the largest number for each example"""
_FIRST_STEPS, _LATER_STEPS = 200, 20
"""steps of training before the first round, and between rounds"""
_PER_ROUND = 3
"""largest number of points of each example that a round queries"""
_FARTHEST, _NEARER = 4.0, 0.85
"""largest radius, in multiples of eps, of the balls in which the network learns the boundary; and the factor of the
radius of an example after a round that crossed the boundary"""
_ROUNDS = 200
"""number of rounds after which further training changes little"""
_PATIENCE = 30
"""number of rounds without a broken example after which the attack ends"""
_CLIMB = 12
"""gradient steps through the network in a round, which cost no query"""
_REACH = 10.0
"""length of these steps in multiples of eps"""


@dataclass(frozen=True)
class StandIn:
    """Trains a small network on the model's answers near the examples, and attacks the model by its gradients."""

    passes: Steps = 2000
    """largest number of queries for each example; with fewer than 60 no network is trained, and Square searches from
    random points"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = False

    @property
    def queries(self) -> int:
        """Largest number of queries for each example, which is all of the passes."""
        return self.passes

    @property
    def searches(self) -> bool:
        """Whether there are too few queries to train a network, so that a random search is run instead."""
        return self.passes < LEAST_PASSES

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        expect_eps(threat.constraint, self)
        norm = expect_norm(threat.constraint, self, Linf, L2, L1)
        if not len(batch):
            return batch.x.clone()
        if self.searches:
            return Square(queries=self.passes)(model, batch, threat, rng=rng.at("search"))
        queries = CountedQueries(model, batch, norm, self.passes)
        logits = queries.begin()
        network = SmallNetwork(batch.x, logits.shape[1], model.bounds, rng.at("network"))
        network.add(batch.x, logits)
        n_first = min(int(_FIRST[0] * self.passes), _FIRST[1])
        for k in range(n_first):
            active = queries.surviving()
            if not len(active):
                return queries.best.x
            x = near(active, batch, norm, model.bounds, k, rng.at("near", k))
            network.add(x, queries.logits(active, x))
        network.train(_FIRST_STEPS)
        self._rounds(queries, network, rng)
        return queries.best.x

    def _rounds(self, queries: CountedQueries, network: SmallNetwork, rng: Draws) -> None:
        """Attack the network, query the points, and train it again with the answers, in turn."""
        radius = torch.full_like(queries.best.margin, _FARTHEST)
        cost, idle = _PER_ROUND + (DOUBLE_CHECKS * _PER_ROUND if queries.randomised else 0), 0
        for number in range(_ROUNDS):
            active, draws = queries.surviving(), rng.at("round", number)
            if not len(active) or idle >= _PATIENCE or queries.passes_left < cost:
                return
            rows = queries.best.rows(active)
            reach = radius[rows] if number % 2 else torch.ones_like(radius[rows])
            x = _climbed(network, active, queries, reach, number, draws)
            wrong = ~(margin(self._asked(queries, network, active, x), active) > 0)
            if number % 2:
                radius[rows] = torch.where(wrong, reach * _NEARER, reach / _NEARER).clamp(1, _FARTHEST)
            share = 0.5 + 0.5 * draws.at("between").uniform(active.ids, 1, dtype=x.dtype)[:, 0]
            self._asked(queries, network, active, torch.lerp(active.x, x, spread(share, x)))
            norm = queries.constraint
            if number % 2:
                self._asked(queries, network, active, norm.project(x, active.x, network.bounds))
            idle = idle + 1 if len(queries.best.surviving) == len(rows) else 0
            network.train(_LATER_STEPS)

    def _asked(self, queries: CountedQueries, network: SmallNetwork, active: Batch, x: Inputs) -> Logits:
        logits = queries.logits(active, x)
        network.add(x, logits)
        return logits


def _climbed(
    network: SmallNetwork, active: Batch, queries: CountedQueries, radius: PerExample, number: int, rng: Draws
) -> Inputs:
    """End of gradient ascent through the network, from a random start, in a ball of `radius` times eps.

    Rounds take turns between the margin, the cross-entropy and one wrong class as the goal.
    """
    norm, bounds = queries.constraint, network.bounds
    loss: Loss = margin_loss if number % 4 < 2 else scaled_cross_entropy
    aim = _aim(network, active, number)
    aimed = active if aim is None else active.towards(aim)
    x = norm.sample(active, bounds, rng)
    for step in range(_CLIMB):
        grad, _ = gradient(network, aimed.at(x), loss)
        size = spread(radius, x) * (_REACH * norm.eps / _CLIMB * cosine(step, _CLIMB))
        x = norm.within(x + size * norm.steepest(grad, x, bounds), active.x, bounds, radius * norm.eps)
    return x


def _aim(network: SmallNetwork, active: Batch, number: int) -> Labels | None:
    """The wrong class that every third round targets: the likeliest first, by the network."""
    if number % 6 < 4 or active.target is not None:
        return None
    with torch.no_grad():
        ranked = likeliest(network(active.x), active.y, 5)
    return ranked[:, number // 6 % ranked.shape[1]]
