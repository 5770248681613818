"""Attacks that are learned once: on other examples, and then the same for every one."""

from dataclasses import replace

import pytest
import torch

from holdfast.attacks import AdversarialPatch, Universal, UniversalDeepFool
from holdfast.core.constraints import L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.patches import Patch
from holdfast.core.threat import ThreatModel
from holdfast.harness import measure
from holdfast.sources.data import open_data
from holdfast.sources.models import open_model

CASES = [
    (Universal(examples=200, steps=40, batch=50, step_size=0.15), Linf(0.2)),
    (Universal(examples=200, steps=40, batch=50), L2(4.0)),
    (AdversarialPatch(examples=200, steps=40, batch=50), Patch(9, 9, "centre", 1)),
    (UniversalDeepFool(examples=200, passes=5), Linf(0.2)),
    (UniversalDeepFool(examples=200, passes=5), L2(4.0)),
]
EACH = pytest.mark.parametrize(("attack", "constraint"), CASES, ids=lambda one: type(one).__name__)


@pytest.fixture(scope="module")
def case():
    data = open_data("mnist-mini", n=400)
    whole = data.read(0, 400)
    return open_model("mnist-cnn").model, whole.take(torch.arange(100)), whole.take(torch.arange(100, 400))


@EACH
def test_breaks_what_it_has_never_seen_more_than_noise_does(case, attack, constraint):
    model, batch, other = case
    threat = ThreatModel(constraint)
    evidence = measure(model, [batch], [attack], threat, fit=other)
    noise = constraint.sample(batch, model.bounds, Draws(0))
    by_noise = ~(margin(model(noise), batch) > 0)
    assert int(evidence["success"].sum()) >= int(by_noise.sum()) + 10
    record = evidence.attacks[0]
    deep = isinstance(attack, UniversalDeepFool)
    assert record.cost.backwards <= 5 * 200 * 9 if deep else record.cost.backwards == 40 * 50
    assert "learned on 200 examples" in record.notes[0]


@EACH
def test_is_the_same_for_every_example_and_stays_inside(case, attack, constraint):
    model, batch, other = case
    threat = ThreatModel(constraint)
    learned = attack.fit(model, other, threat, rng=Draws(3))
    assert torch.equal(learned, attack.fit(model, other, threat, rng=Draws(3)))
    fitted = attack.fitted(learned)
    whole = fitted(model, batch, threat, rng=Draws(0))
    assert allowed(constraint, whole, batch.x, model.bounds).all()
    assert torch.equal(fitted(model, batch.take(torch.tensor([7])), threat, rng=Draws(0)), whole[7:8])


def test_stops_once_enough_are_fooled(case):
    model, batch, other = case
    threat = ThreatModel(L2(8.0))
    costs = [
        measure(model, [batch], [UniversalDeepFool(passes=4, rate=rate)], threat, fit=other).attacks[0].cost
        for rate in (0.1, 1.0)
    ]
    assert costs[0].backwards < costs[1].backwards


def test_reaches_a_class(case):
    model, batch, other = case
    threat = ThreatModel(Patch(14, 14, "centre"), goal=3)
    attack = AdversarialPatch(examples=200, steps=60, batch=50)
    aimed = batch.take(batch.y != 3)
    evidence = measure(model, [aimed], [attack], threat, fit=other)
    assert evidence["success"].double().mean() > 0.5


def test_never_learns_on_what_is_judged(case):
    model, batch, _ = case
    threat = ThreatModel(Linf(0.2))
    with pytest.raises(UsageError, match="not judged"):
        measure(model, [batch], [CASES[0][0]], threat, fit=replace(batch, ids=batch.ids + 1000))


def test_is_refused_without_examples_and_under_a_budget(case):
    model, batch, other = case
    attack = CASES[0][0]
    with pytest.raises(UsageError, match="--fit"):
        measure(model, [batch], [attack], ThreatModel(Linf(0.2)))
    with pytest.raises(UsageError, match="queries=5"):
        measure(model, [batch], [attack], ThreatModel(Linf(0.2), queries=5), fit=other)
    with pytest.raises(UsageError, match="learned before it attacks"):
        attack(model, batch, ThreatModel(Linf(0.2)), rng=Draws(0))
