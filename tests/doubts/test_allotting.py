"""On how many examples each probe runs where every row has its price: within the budget, or not at all."""

import pytest

from holdfast.attacks import PGD, RayS, Square
from holdfast.attacks.costs import Passes
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.model import Batches
from holdfast.core.threat import ThreatModel
from holdfast.doubts.probing import LEAST, Allotment, allotted, as_allotted, probe_rows, probes_for
from holdfast.testing.fakes import examples, labelled, network

THREAT = ThreatModel(Linf(0.1), access="scores", queries=60)


@pytest.mark.parametrize("batches", [None, Batches(8), Batches(32)])
@pytest.mark.parametrize("budget", [0, 300, 1_000, 4_000, 20_000, 10**6])
@pytest.mark.parametrize("n", [0, 3, 20, 100])
def test_all_probes_together_keep_to_the_budget_and_none_runs_on_too_few(batches, budget, n):
    attacks, passes = (Square(),), Passes(64, batches)
    probes = {probe.name: probe for probe in probes_for(THREAT, dict(enumerate(attacks)))}
    wanted = {name: min(n, 32) if name == "again" else n for name in probes}

    def cost(name, k):
        return probe_rows(probes[name], THREAT, k, passes, randomised=False)

    found = allotted(wanted, budget, cost)
    assert sum(cost(name, k) for name, k in found.examples.items()) <= budget
    assert {*found.examples, *found.reasons} == set(probes)
    for name, k in found.examples.items():
        assert min(LEAST, wanted[name]) <= k <= wanted[name]
    if budget == 10**6:
        assert found.examples == wanted


@pytest.mark.parametrize("randomised", [False, True])
@pytest.mark.parametrize("batches", [None, Batches(4)])
def test_a_probe_sends_at_most_the_computed_number_of_rows(batches, randomised):
    model, n, threat = network(), 7, ThreatModel(Linf(0.01), access="scores", queries=30)
    batch, passes, rows = labelled(model, examples(n=n)), Passes(n, batches), []
    for probe in probes_for(threat, {0: Square(), 1: RayS()}):

        class Sent:
            bounds = model.bounds

            def __call__(self, x, ids=None):
                rows.append(passes.filled(len(x)))
                return model(x)

        rows.clear()
        look = probe.voted if randomised and probe.voted else probe.run
        look(Sent(), batch, threat, Draws(0))
        assert 0 < sum(rows) <= probe_rows(probe, threat, n, passes, randomised=randomised)


def test_an_attack_that_nothing_bounds_is_not_run_again():
    threat = ThreatModel(Linf(0.1))
    again = {probe.name: probe for probe in probes_for(threat, {0: PGD()})}["again"]

    def cost(name, k):
        return probe_rows(again, threat, k, Passes(8), randomised=False)

    found = allotted({"again": 9}, 10**9, cost)
    assert found.examples == {} and "queries=1000" in found.reasons["again"]


def test_doubts_name_missing_attacks_and_small_samples():
    allotment = Allotment(
        {"noise": 9}, {"noise": 20, "again": 20, "steadiness": 20}, {"again": "A", "steadiness": "S"}
    )
    doubts = (
        Doubt("noise", "clear", 0.0, 0.005, 9, "random draws break 0"),
        Doubt("not-exhausted", "clear", 0.0, 2.0),
        Doubt("state", "clear", 0.0, 0.0, 20, "no layer"),
        Doubt("randomness", "not measured", message="no example was left"),
        Doubt("chance", "clear"),
    )
    found = {doubt.name: doubt for doubt in as_allotted(doubts, allotment)}
    assert found["noise"].message.startswith(
        "random draws break 0; 9 of 20 examples, because for a served model"
    )
    assert found["not-exhausted"] == Doubt("not-exhausted", "not measured", message="A")
    assert found["state"] == Doubt("state", "not measured", message="S")
    assert found["randomness"].message == "S" and found["chance"] is doubts[-1]
    broken = Doubt("not-exhausted", "raised", 1.0, 0.0)
    assert as_allotted((broken,), allotment) == (broken,)
