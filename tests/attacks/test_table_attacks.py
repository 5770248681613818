"""Attacks on tables reach the exact worst case of linear models, and return only rows that the rules allow."""

import math

import pytest
import torch
from torch import nn

from holdfast.attacks import CAPGD, ColumnSearch, GeneticSearch
from holdfast.attacks.pgd import PGD
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.models import Declared
from holdfast.settings.table_rules import rules_from
from holdfast.threats.tables import Table

WEIGHTS = torch.tensor([1.0, -0.5, 2.0, 0.0, 1.5, 0.7])
COLUMNS = {
    "a": {"min": 0, "max": 10},
    "b": {"min": 0, "max": 4, "change": "up"},
    "c": {"type": "whole", "min": 0, "max": 20},
    "d": {"min": 0, "max": 1, "change": "none"},
    "e": {"type": "category", "values": ["x", "y", "z"], "cost": 0.2},
    "f": {"min": -5, "max": 5, "cost": 2},
}
UNITS = torch.tensor([10.0, 4.0, 20.0, 1.0, 0.0, 5.0])
EPS = 0.3


def table(**changes):
    rules = rules_from({"columns": COLUMNS, "budget": {"norm": "linf", "eps": EPS}} | changes, "rules.yaml")
    return Table("rules.yaml", rules.content, EPS)


def examples(n=40):
    draws, ids = Draws(5), torch.arange(n)
    low = torch.tensor([0.0, 0, 0, 0, 0, -5])
    high = torch.tensor([10.0, 4, 20, 1, 2, 5])
    x = low + (high - low) * draws.uniform(ids, 6)
    x[:, [2, 4]] = x[:, [2, 4]].round()
    y = (logit(x) > 0).long()
    return Batch(x, y, ids)


def logit(x):
    return x @ WEIGHTS - 22.0


class Linear(nn.Module):
    def forward(self, x):
        return torch.stack((torch.zeros(len(x)), logit(x)), 1)


def model():
    return Declared(classes=2, rules=table().rules).wrap(Linear())


def worst_margins(batch):
    """Return the exact smallest margin within the rules: every column moves as far as it can."""
    sign = torch.where(batch.y == 1, 1.0, -1.0)[:, None]
    low = torch.tensor([0.0, 0, 0, 0, 0, -5])
    high = torch.tensor([10.0, 4, 20, 1, 2, 5])
    down, up = (batch.x - EPS * UNITS).maximum(low), (batch.x + EPS * UNITS).minimum(high)
    down[:, 1] = batch.x[:, 1]  # only up
    down[:, [3, 4]], up[:, [3, 4]] = batch.x[:, [3, 4]], batch.x[:, [3, 4]]
    down[:, 2], up[:, 2] = down[:, 2].ceil(), up[:, 2].floor()
    down[:, 4], up[:, 4] = 0, 2
    worst = torch.where(sign * WEIGHTS > 0, down, up)
    return sign[:, 0] * logit(worst)


@pytest.mark.parametrize("attack", [CAPGD(), ColumnSearch(), GeneticSearch()])
def test_attacks_reach_the_exact_worst_case_of_a_linear_model(attack):
    batch, constraint = examples(), table()
    if isinstance(attack, CAPGD):  # it moves numbers only
        columns = COLUMNS | {"e": COLUMNS["e"] | {"change": "none"}}
        constraint = table(columns=columns)
        exact = worst_margins(batch) + 1.5 * torch.where(batch.y == 1, batch.x[:, 4], 2 - batch.x[:, 4])
    else:
        exact = worst_margins(batch)
    net = model()
    x_adv = attack(net, batch, ThreatModel(constraint), rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, net.bounds).all()
    margins = margin(net(x_adv), batch)
    broken = margins <= 0
    assert not (broken & (exact > 1e-4)).any()  # never more than the worst case
    assert torch.equal(broken, exact <= -0.3) or (broken == (exact <= 0)).float().mean() >= 0.95
    if not isinstance(attack, GeneticSearch):
        assert (margins[~broken] <= exact[~broken] + 0.1).all()


def test_column_search_tries_whole_groups():
    columns = {name: {"type": "whole", "min": 0, "max": 1} for name in ("red", "green", "blue")}
    content = {"columns": columns, "groups": [list(columns)], "budget": {"norm": "l0", "eps": 1}}
    constraint = Table("r", rules_from(content, "r").content, 1)
    batch = Batch(torch.tensor([[1.0, 0, 0]]), torch.tensor([0]), torch.tensor([0]))
    net = Declared(classes=2, rules=constraint.rules).wrap(nn.Linear(3, 2))
    with torch.no_grad():
        net.net.weight.copy_(torch.tensor([[3.0, 2, 0], [0, 0, 5]]))
        net.net.bias.zero_()
    for attack in (ColumnSearch(), GeneticSearch(population=4, generations=5)):
        assert attack(net, batch, ThreatModel(constraint), rng=Draws(0)).tolist() == [[0, 0, 1]]


def test_an_add_only_attacker_never_lowers_a_value():
    columns = {name: column | {"change": "up"} for name, column in COLUMNS.items() if name in "abcf"}
    constraint = Table("r", rules_from({"columns": columns}, "r").content, math.inf)
    batch = examples()
    batch = batch.at(batch.x[:, [0, 1, 2, 5]])

    class Four(nn.Module):
        def forward(self, x):
            score = x @ WEIGHTS[[0, 1, 2, 5]] - 20
            return torch.stack((torch.zeros(len(x)), score), 1)

    net = Declared(classes=2, rules=constraint.rules).wrap(Four())
    for attack in (CAPGD(steps=10, restarts=2), ColumnSearch(rounds=3), GeneticSearch(generations=5)):
        x_adv = attack(net, batch, ThreatModel(constraint), rng=Draws(0))
        assert (x_adv >= batch.x).all()
        assert (x_adv != batch.x).any()


@pytest.mark.parametrize("attack", [ColumnSearch(queries=30), GeneticSearch()])
def test_attacks_respect_the_query_budget(attack):
    batch, net = examples(), model()
    threat = ThreatModel(table(), queries=45)
    meter = Metered(net, batch, threat)
    attack(meter, batch, threat, rng=Draws(0))
    assert int(meter.spent.queries.max()) <= (30 if isinstance(attack, ColumnSearch) else 45)


@pytest.mark.parametrize("attack", [CAPGD(steps=8), ColumnSearch(), GeneticSearch(generations=6)])
def test_results_do_not_depend_on_the_other_examples(attack):
    if isinstance(attack, ColumnSearch):
        attack = ColumnSearch(columns=6)  # all of them, because they are chosen by their mean effect
    batch, net, threat = examples(), model(), ThreatModel(table())
    together = attack(net, batch, threat, rng=Draws(0))
    for rows in (torch.arange(3), torch.arange(30, 40)):
        alone = attack(net, batch.take(rows), threat, rng=Draws(0))
        torch.testing.assert_close(alone, together[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attack", [CAPGD(), ColumnSearch(), GeneticSearch()])
def test_attacks_on_tables_need_rules(attack):
    net = Classifier(Linear(), classes=2)
    with pytest.raises(UsageError, match="changes rows of a table by its rules"):
        attack(net, examples(), ThreatModel(Linf(0.1)), rng=Draws(0))


def test_ordinary_gradient_attacks_stay_within_the_rules():
    batch, net, constraint = examples(), model(), table()
    x_adv = PGD(steps=20)(net, batch, ThreatModel(constraint), rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, net.bounds).all()
    assert (margin(net(x_adv), batch) < margin(net(batch.x), batch)).float().mean() > 0.9
