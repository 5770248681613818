"""Attacks that are learned once: on other examples, and then the same for every one."""

from dataclasses import replace

import pytest
import torch

from holdfast.attacks import AdversarialPatch, Universal, UniversalDeepFool
from holdfast.attacks.parts.images import Pasted
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model
from holdfast.runs.harness.kinds.attack import best_fit
from holdfast.runs.harness.measure import measure
from holdfast.threats.transformations import Patch

CASES = [
    (Universal(fits=2, examples=200, steps=40, batch=50, step_size=0.15), Linf(0.2)),
    (Universal(fits=2, examples=200, steps=40, batch=50), L2(4.0)),
    (AdversarialPatch(fits=2, examples=200, steps=40, batch=50), Patch(9, 9, "centre", 1)),
    (UniversalDeepFool(fits=2, examples=200, passes=5), Linf(0.2)),
    (UniversalDeepFool(fits=2, examples=200, passes=5), L2(4.0)),
]
EACH = pytest.mark.parametrize(("attack", "constraint"), CASES, ids=lambda one: type(one).__name__)


@pytest.fixture(scope="module")
def case():
    data = open_data("mnist-mini", n=400)
    whole = data.read(0, 400)
    return open_model("mnist-cnn").model, whole.take(torch.arange(100)), whole.take(torch.arange(100, 400))


@pytest.mark.slow
@EACH
def test_a_learned_attack_breaks_new_examples_more_often_than_noise(case, attack, constraint):
    model, batch, other = case
    threat = ThreatModel(constraint)
    evidence = measure(model, [batch], [attack], threat, fit=other)
    noise = constraint.sample(batch, model.bounds, Draws(0))
    by_noise = ~(margin(model(noise), batch) > 0)
    assert int(evidence["success"].sum()) >= int(by_noise.sum()) + 10
    record = evidence.attacks[0]
    deep = isinstance(attack, UniversalDeepFool)
    most = attack.fits * 5 * 200 * 9
    assert record.cost.backwards <= most if deep else record.cost.backwards == attack.fits * 40 * 50
    assert f"on 100 examples that are not judged, the best of {attack.fits} fits" in record.notes[0]
    assert record.fits == attack.fits


@pytest.mark.slow
@EACH
def test_is_the_same_for_every_example_and_stays_inside(case, attack, constraint):
    model, batch, other = case
    threat, other = ThreatModel(constraint), other.take(torch.arange(40))
    learned = attack.fit(model, other, threat, rng=Draws(3))
    assert torch.equal(learned, attack.fit(model, other, threat, rng=Draws(3)))
    fitted = attack.fitted(learned)
    whole = fitted(model, batch, threat, rng=Draws(0))
    assert allowed(constraint, whole, batch.x, model.bounds).all()
    assert torch.equal(fitted(model, batch.take(torch.tensor([7])), threat, rng=Draws(0)), whole[7:8])


@pytest.mark.slow
def test_stops_once_enough_are_fooled(case):
    model, batch, other = case
    threat, attack = ThreatModel(L2(8.0)), UniversalDeepFool(fits=1, examples=60, passes=3)
    costs = [
        measure(model, [batch], [replace(attack, rate=rate)], threat, fit=other).attacks[0].cost
        for rate in (0.01, 1.0)
    ]
    assert costs[0].backwards < costs[1].backwards


def test_reaches_a_class(case):
    model, batch, other = case
    threat = ThreatModel(Patch(14, 14, "centre"), goal=3)
    attack = AdversarialPatch(fits=1, examples=200, steps=60, batch=50)
    aimed = batch.take(batch.y != 3)
    evidence = measure(model, [aimed], [attack], threat, fit=other)
    assert evidence["success"].double().mean() > 0.5


def test_a_learned_attack_is_not_learned_on_judged_examples(case):
    model, batch, _ = case
    threat = ThreatModel(Linf(0.2))
    with pytest.raises(UsageError, match="not judged"):
        measure(model, [batch], [CASES[0][0]], threat, fit=replace(batch, ids=batch.ids + 1000))


def test_is_refused_without_examples_and_under_a_budget(case):
    model, batch, other = case
    attack = CASES[0][0]
    with pytest.raises(UsageError, match="fit=DATA"):
        measure(model, [batch], [attack], ThreatModel(Linf(0.2)))
    with pytest.raises(UsageError, match="queries=5"):
        measure(model, [batch], [attack], ThreatModel(Linf(0.2), queries=5), fit=other)
    with pytest.raises(UsageError, match="must be fitted before it attacks"):
        attack(model, batch, ThreatModel(Linf(0.2)), rng=Draws(0))


def test_of_several_fits_the_best_on_examples_apart_is_taken():
    """The fit that is taken breaks as many as the best of them."""
    data = open_data("mnist-mini", n=400).read(0, 400)
    model, other = open_model("mnist-cnn").model, data.take(torch.arange(100, 400))
    attack, threat = Universal(steps=3, batch=20, fits=6), ThreatModel(Linf(0.3))

    def broken(learned):
        return int(
            (margin(model(attack.fitted(learned)(model, other, threat, rng=Draws(0))), other) <= 0).sum()
        )

    learned, fits, chose = best_fit(attack, model, other, threat, rng=Draws(1))
    assert fits == 6 and int(chose.sum()) == len(other) // 2
    learns = other.take(~chose)
    each = [broken(attack.refit(k, model, learns, threat, rng=Draws(1))) for k in range(6)]
    assert broken(learned) == max(each) > min(each)


class Corner(torch.nn.Module):
    """Takes an image for class 1 where the pixel at (2, 5) is bright, or those at (0, 0) and (1, 1) both are."""

    def forward(self, x):
        there, apart = x[:, 0, 2, 5], torch.minimum(x[:, 0, 0, 0], x[:, 0, 1, 1])
        bright = torch.maximum(there, apart) - 0.5
        return torch.stack((-bright, bright), 1)


@pytest.mark.parametrize("at", ["anywhere", "centre"])
def test_a_learned_patch_is_judged_at_the_worst_place_of_each_image(at):
    model = Classifier(Corner(), classes=2)
    batch = Batch(torch.zeros(40, 1, 6, 7), torch.zeros(40, dtype=torch.int64), torch.arange(40))
    threat, attack = ThreatModel(Patch(1, 1, at)), Pasted(torch.ones(1, 1, 1, 1))
    assert bool(((margin(model(attack(model, batch, threat, rng=Draws(0))), batch)) <= 0).all()) == (
        at == "anywhere"
    )
    evidence = measure(model, [batch], [attack], threat)
    (record,) = evidence.attacks
    if at == "centre":  # a single place, which is no choice
        assert record.places is None and record.surviving_after == 40
        return
    assert record.surviving_after == 0
    assert record.places.tried == 42 and 30 <= record.places.surviving_at_random < 40
    assert f"at one random place of each, {record.places.surviving_at_random} survive" in record.notes[-1]
    few = measure(model, [batch], [replace(attack, places=10)], threat, seed=1)
    assert few.attacks[0].places.tried == 10
