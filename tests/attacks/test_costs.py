"""How many rows an attack asks for at most: every attack without gradients keeps to it, padding included."""

import dataclasses
import inspect

import pytest
import torch

from holdfast import attacks
from holdfast.attacks.costs import Passes, most_queries, most_rows
from holdfast.core.constraints import L0, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Batches, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, network
from holdfast.threats.transformations import Spatial

KINDS = [
    kind
    for kind in (getattr(attacks, name) for name in attacks.__all__)
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind) and hasattr(kind, "needs")
]
# attacks that need texts or rules of a table count their queries in their own tests
OTHERS = (attacks.ByteSearch, attacks.ColumnSearch, attacks.GeneticSearch, attacks.TextSearch)
ASKING = [kind for kind in KINDS if kind.needs in ("scores", "labels") and kind not in OTHERS]
SPATIAL = Spatial(rotate=5.0)


class Sent:
    """A network that counts the rows that it is sent."""

    def __init__(self, net):
        self.net, self.rows = net, 0

    def __call__(self, x):
        self.rows += len(x)
        return self.net(x)


def run(attack, batches, n=3):
    """The rows that the attack sent, and the most that it may."""
    model = network()
    batch = labelled(model, examples(n=n))
    sent = Sent(model)
    asked = Classifier(sent, access="scores", batches=batches)
    for constraint in (Linf(0.01), L2(0.05), L0(1), SPATIAL):
        threat = ThreatModel(constraint, access="scores")
        try:
            attack(asked, batch, threat, rng=Draws(0))
        except UsageError:
            continue
        return sent.rows, most_rows(attack, threat, n, Passes(n, batches))
    raise AssertionError(f"{attack} runs under none of the constraints")


def test_there_are_attacks_of_every_need():
    assert len(ASKING) >= 14


@pytest.mark.parametrize("kind", ASKING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("batches", [None, Batches(4)], ids=["any", "fixed"])
def test_an_attack_uses_at_most_the_queries_of_its_settings(kind, batches):
    settings = {"queries": 30} if "queries" in kind.__dataclass_fields__ else {}
    sent, most = run(kind(**settings), batches)
    assert most is not None and 0 < sent <= most
    if batches is None and settings:
        assert most == 3 * 30


def test_the_queries_of_an_attack_with_steps_follow_from_a_budget_only():
    threat = ThreatModel(Linf(0.1))
    assert most_queries(attacks.PGD(), threat) is None
    assert most_rows(attacks.PGD(), threat, 5, Passes(5)) is None
    assert most_queries(attacks.PGD(), dataclasses.replace(threat, queries=7)) == 7
    assert most_queries(attacks.Square(queries=5), dataclasses.replace(threat, queries=7)) == 5
    assert most_queries(attacks.Transfer(), threat) == 0
    assert Passes(3).once(0) == 0


@pytest.mark.parametrize("shards", [(), (10,), (6, 4), (3, 3, 3, 1)])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_number_of_rows_does_not_depend_on_the_shards(shards, size):
    passes, draw = Passes(3, Batches(size), shards), torch.Generator().manual_seed(0)
    for n in range(11):
        most = passes.once(n)
        for _ in range(20):
            chosen = torch.zeros(10, dtype=torch.bool)
            chosen[torch.randperm(10, generator=draw)[:n]] = True
            parts = chosen.split(list(shards)) if len(shards) > 1 else (chosen,)
            sent = sum(passes.filled(piece) for part in parts for piece in passes.pieces(int(part.sum())))
            assert sent <= most
