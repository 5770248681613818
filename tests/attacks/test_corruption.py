"""Common corruptions through the harness: what is counted, refused and repeated."""

from dataclasses import replace

import pytest
import torch

from holdfast.attacks import PGD, Corruption, Square
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.threat import ThreatModel
from holdfast.corruptions import corrupted
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model
from holdfast.metrics.catalogue import estimate, estimates
from holdfast.runs.harness.measure import measure
from holdfast.threats.transformations import Corruptions

NAMES = ("gaussian_noise", "fog")


@pytest.fixture(scope="module")
def case():
    return open_model("mnist-cnn").model, open_data("mnist-mini", n=80).read(0, 80)


def test_counts_every_example_under_every_corruption(case):
    model, batch = case
    y = batch.y.clone()
    y[:10] = (y[:10] + 1) % 10  # wrong when clean, and yet counted under each corruption
    wrong = replace(batch, y=y)
    threat, seed = ThreatModel(Corruptions(5)), 3
    attacks = [Corruption(name) for name in NAMES]
    evidence = measure(model, [wrong], attacks, threat, seed=seed)
    held = evidence["correct"].clone()
    for k, name in enumerate(NAMES, 1):
        # a stage is named after its place and its attack
        rng = Draws(seed).at("stage", f"{k}-corruption")
        x = corrupted(name, wrong.x, 5, wrong.ids, rng)
        right = margin(model(x), wrong) > 0
        held &= right
        assert torch.equal(evidence[f"{name}.right"], right)
    assert torch.equal(evidence["correct"] & ~evidence["success"], held)
    assert evidence.attacks[-1].surviving_after == int(held.sum())
    assert not evidence["success"][~evidence["correct"]].any()
    assert evidence.cost.queries == len(wrong)  # the clean pass


def test_is_refused_elsewhere_and_refuses_others(case):
    model, batch = case
    with pytest.raises(UsageError, match="common corruption; the threat model is linf"):
        measure(model, [batch.take(torch.arange(2))], [Corruption("fog")], ThreatModel(Linf(0.1)))
    for attack in (PGD(steps=2), Square(queries=5)):
        with pytest.raises(UsageError, match="corruptions|Corruptions"):
            measure(model, [batch.take(torch.arange(2))], [attack], ThreatModel(Corruptions(3)))


def test_does_not_depend_on_the_company(case):
    model, batch = case
    threat, attack = ThreatModel(Corruptions(4)), Corruption("snow")
    whole = attack(model, batch, threat, rng=Draws(1))
    some = torch.tensor([40, 3, 17])
    torch.testing.assert_close(attack(model, batch.take(some), threat, rng=Draws(1)), whole[some])


def test_metrics_are_absent_without_corruptions(case):
    model, batch = case
    evidence = measure(model, [batch], [PGD(steps=1)], ThreatModel(Linf(0.01)))
    assert not [name for name in estimates(evidence) if "corruption" in name or name == "fog_accuracy"]
    with pytest.raises(UsageError, match="a threat such as corruptions:3"):
        estimate("fog_accuracy", evidence)


def test_errors_are_means_over_the_corruptions_and_ratios_to_the_baseline(case):
    _, batch = case
    threat = ThreatModel(Corruptions(5))
    runs = []
    for address in ("mnist-cnn", "mnist-cnn-hardened"):
        attacks = [Corruption(name) for name in ("frost", "fog")]
        runs.append(measure(open_model(address).model, [batch], attacks, threat))
    mine, theirs = (torch.stack([~run[f"{name}.right"] for name in ("frost", "fog")]) for run in runs)
    errors, before = mine.double().mean(1), theirs.double().mean(1)
    assert (before > 0).all()
    assert estimate("corruption_error_rate", runs[0]).value == pytest.approx(float(errors.mean()))
    assert estimate("worst_corruption", runs[0]).value == pytest.approx(1 - float(errors.max()))
    assert estimate("fog_accuracy", runs[0]).value == pytest.approx(1 - float(errors[1]))
    ratio = estimate("mce", runs[0], baseline=runs[1])
    assert ratio.value == pytest.approx(float((errors / before).mean()))
    assert ratio.low <= ratio.value <= ratio.high
