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

from holdfast.attacks.parts.ascent import cosine, gradient
from holdfast.attacks.parts.counted_queries import CountedQueries
from holdfast.attacks.parts.losses import Loss, likeliest, margin_loss, scaled_cross_entropy
from holdfast.attacks.parts.norms import expect_eps, expect_norm
from holdfast.attacks.parts.small_networks import SmallNetwork
from holdfast.attacks.parts.starts import near
from holdfast.attacks.square import Square
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, Labels, Steps

LEAST_PASSES = 60
"""Smallest number of queries for each example from which a network is trained: with fewer, more than half of them would
serve the training alone."""
_FIRST = (0.125, 40)
"""share of the queries for the first training, and the largest number for each example"""
_FIRST_STEPS, _LATER_STEPS = 400, 60
"""steps of training before the first round, and between rounds"""
_PER_ROUND = (3, 12)
"""smallest and largest number of points of each example that a round queries"""
_ROUNDS = 60
"""number of rounds after which further training changes little"""
_PATIENCE = 12
"""number of rounds without a broken example after which the attack ends"""
_CLIMB = 20
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
        fewest, most = _PER_ROUND
        points = max(fewest, min(most, queries.passes_left // _ROUNDS))
        unchanged = 0
        for number in range(_ROUNDS):
            active = queries.surviving()
            # a randomised model is asked again about each broken point
            if (
                not len(active)
                or unchanged >= _PATIENCE
                or queries.passes_left < points * (1 + 4 * queries.randomised)
            ):
                return
            n_active = len(active)
            for x in _climbed(network, active, queries, number, points, rng.at("round", number)):
                network.add(x, queries.logits(active, x))
            unchanged = unchanged + 1 if len(queries.best.surviving) == n_active else 0
            network.train(_LATER_STEPS)


def _climbed(
    network: SmallNetwork, active: Batch, queries: CountedQueries, number: int, points: int, rng: Draws
) -> list[Inputs]:
    """Points of gradient ascent through the network from a random start or the best point so far, the last one last.

    Rounds take turns between the margin, the cross-entropy and one wrong class as the goal.
    """
    norm, bounds = queries.constraint, network.bounds
    rows = queries.best.rows(active)
    x = queries.best.x[rows] if number % 2 else norm.sample(active, bounds, rng)
    loss: Loss = margin_loss if number % 3 else scaled_cross_entropy
    aimed, aim = active, _aim(network, active, number)
    if aim is not None:
        aimed = active.towards(aim)
    shown = {round((k + 1) * _CLIMB / points) for k in range(points)}
    kept: list[Inputs] = []
    for step in range(_CLIMB):
        grad, _ = gradient(network, aimed.at(x), loss)
        size = _REACH * norm.eps / _CLIMB * cosine(step, _CLIMB)
        x = norm.project(torch.add(x, norm.steepest(grad, x, bounds), alpha=size), active.x, bounds)
        if step + 1 in shown:
            kept.append(x)
    return kept


def _aim(network: SmallNetwork, active: Batch, number: int) -> Labels | None:
    """The wrong class that every third round targets: the likeliest first, by the network."""
    if number % 3 != 2 or active.target is not None:
        return None
    with torch.no_grad():
        ranked = likeliest(network(active.x), active.y, 5)
    return ranked[:, number // 3 % ranked.shape[1]]
